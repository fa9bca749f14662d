import * as api from "./api.js";
import * as store from "./store.js";
import { element, render } from "./text.js";

const at = (id) => document.getElementById(id);
const page = {
  turns: at("turns"), ask: at("ask"), question: at("question"), send: at("send"),
  stop: at("stop"), chain: at("chain"), talks: at("talks"), side: at("side"), menu: at("menu"),
  settings: at("settings"),
};

let settings = store.loadSettings();
let talks = store.loadTalks();
let talk = talks[0] ?? store.newTalk();
let running = null; // the AbortController of the answer that comes

// --- what is shown ----------------------------------------------------------------------

function showTalks() {
  const all = talks.includes(talk) ? talks : [talk, ...talks];
  page.talks.replaceChildren(...all.map((one) => {
    const row = element("li");
    const open = element("button", store.title(one), "talk");
    open.type = "button";
    open.setAttribute("aria-current", String(one === talk));
    open.onclick = () => openTalk(one);
    const forget = element("button", "\u00d7");
    forget.type = "button";
    forget.setAttribute("aria-label", `Forget: ${store.title(one)}`);
    forget.onclick = () => forgetTalk(one);
    row.append(open, forget);
    return row;
  }));
}

function showTurns() {
  page.turns.replaceChildren(...talk.turns.map(turnElement));
  page.chain.textContent = "";
  toEnd();
}

function turnElement(turn, index) {
  const made = element("article", undefined, `turn ${turn.role}`);
  made.setAttribute("aria-label", turn.role === "user" ? "You" : "Answer");
  const body = element("div");
  if (turn.role === "user") body.textContent = turn.content;
  else render(body, turn.content);
  made.append(body);
  const isLast = index === talk.turns.length - 1;
  if (turn.role === "assistant") made.append(noteElement(turn, isLast));
  return made;
}

function noteElement(turn, isLast) {
  const note = element("div", undefined, "note faint");
  if (turn.error) note.append(element("span", turn.error, "bad"));
  if (turn.facts) note.append(element("span", turn.facts));
  for (const repair of turn.repairs ?? []) note.append(element("span", repairText(repair), "repaired"));
  if (isLast && !running) {
    const again = element("button", "Answer again");
    again.type = "button";
    again.onclick = regenerate;
    note.append(again);
  }
  if (turn.content) {
    const copy = element("button", "Copy");
    copy.type = "button";
    copy.onclick = () => navigator.clipboard?.writeText(turn.content);
    note.append(copy);
  }
  return note;
}

const short = (peer) => peer.slice(0, 8);

function repairText(repair) {
  const lost = repair.lost.map(short).join(", ") || "a link";
  const found = repair.replacement.map(short).join(", ");
  return `repaired after ${repair.position} tokens: ${lost}${found ? ` \u2192 ${found}` : ""}, ` +
    `${repair.pause_s.toFixed(2)} s`;
}

function chainText(chain) {
  return "answered by " + chain.map(
    ({ peer, blocks }) => `${short(peer)} [${blocks[0]}, ${blocks[1]})`).join(" \u2192 ");
}

function toEnd() {
  page.turns.scrollTop = page.turns.scrollHeight;
}

function isAtEnd() {
  return page.turns.scrollHeight - page.turns.scrollTop - page.turns.clientHeight < 80;
}

// --- answers ----------------------------------------------------------------------------

function messages() {
  const said = talk.turns.filter((turn) => turn.content)
    .map(({ role, content }) => ({ role, content }));
  return settings.system ? [{ role: "system", content: settings.system }, ...said] : said;
}

async function respond() {
  const asked = messages();
  const turn = { role: "assistant", content: "", repairs: [] };
  talk.turns.push(turn);
  const mine = talk;
  running = new AbortController();
  showRunning();
  showTurns();
  const body = page.turns.lastElementChild.firstElementChild;
  body.classList.add("writing");
  const started = performance.now();
  let firstAt = null;
  let drawing = false;
  const draw = () => {
    drawing = false;
    if (mine !== talk) return;
    const follow = isAtEnd();
    render(body, turn.content);
    if (follow) toEnd();
  };
  try {
    await api.answer(asked, settings, running.signal, (chunk) => {
      if (chunk.shoal?.chain) page.chain.textContent = chainText(chunk.shoal.chain);
      if (chunk.usage) {
        turn.repairs = chunk.shoal?.recoveries ?? [];
        turn.facts = factsText(chunk.usage, started, firstAt);
      } else if (chunk.shoal?.recoveries) {
        turn.repairs.push(...chunk.shoal.recoveries);
        page.chain.textContent = chunk.shoal.recoveries.map(repairText).join("; ");
      }
      const text = chunk.choices[0]?.delta?.content;
      if (!text) return;
      firstAt ??= performance.now();
      turn.content += text;
      if (!drawing) {
        drawing = true;
        requestAnimationFrame(draw);
      }
    });
  } catch (error) {
    if (error.name === "AbortError") turn.facts = "stopped";
    else turn.error = error.message;
    if (error.status === 401) openSettings();
  }
  running = null;
  keep(mine);
  showRunning();
  if (mine === talk) {
    const chain = page.chain.textContent;
    showTurns();
    page.chain.textContent = chain;
  }
}

function factsText(usage, started, firstAt) {
  const tokens = usage.completion_tokens;
  const parts = [`${tokens} tokens`];
  if (firstAt !== null) {
    parts.push(`first after ${((firstAt - started) / 1000).toFixed(2)} s`);
    const seconds = (performance.now() - firstAt) / 1000;
    if (tokens > 1 && seconds > 0) parts.push(`${((tokens - 1) / seconds).toFixed(1)} tokens/s`);
  }
  const kept = usage.prompt_tokens_details?.cached_tokens ?? 0;
  parts.push(`${usage.prompt_tokens} before them, ${kept} of these kept`);
  return parts.join(", ");
}

function showRunning() {
  page.send.hidden = Boolean(running);
  page.stop.hidden = !running;
}

function regenerate() {
  if (running) return;
  if (talk.turns.at(-1)?.role === "assistant") talk.turns.pop();
  respond();
}

function ask() {
  const text = page.question.value.trim();
  if (!text || running) return;
  page.question.value = "";
  grow();
  talk.turns.push({ role: "user", content: text });
  respond();
  showTalks();
}

function stop() {
  running?.abort();
}

// --- conversations ------------------------------------------------------------------------

function keep(one) {
  if (one.isForgotten) return;
  talks = [one, ...talks.filter((other) => other !== one)];
  if (!store.saveTalks(talks)) page.chain.textContent = "this browser keeps no conversations";
  showTalks();
}

function openTalk(one) {
  stop();
  talk = one;
  page.side.classList.remove("open");
  page.menu.setAttribute("aria-expanded", "false");
  showTalks();
  showTurns();
  page.question.focus();
}

function forgetTalk(one) {
  one.isForgotten = true;
  talks = talks.filter((other) => other !== one);
  store.saveTalks(talks);
  if (one === talk) openTalk(talks[0] ?? store.newTalk());
  else showTalks();
}

// --- settings -----------------------------------------------------------------------------

const NUMBERS = ["temperature", "top_p", "max_tokens", "seed"];
const OPTIONAL = ["max_tokens", "seed"];

function fields() {
  return page.settings.querySelector("form").elements;
}

function openSettings() {
  for (const [name, value] of Object.entries(settings)) {
    if (fields()[name]) fields()[name].value = value ?? "";
  }
  if (!page.settings.open) page.settings.showModal();
}

function takeSettings() {
  const taken = {};
  for (const name of Object.keys(settings)) {
    const text = fields()[name]?.value ?? "";
    if (!NUMBERS.includes(name)) taken[name] = text;
    else if (text !== "" && Number.isFinite(Number(text))) taken[name] = Number(text);
    else taken[name] = OPTIONAL.includes(name) ? null : settings[name];
  }
  settings = taken;
  store.saveSettings(settings);
  showTheme();
  showModel();
}

function showTheme() {
  if (settings.theme) document.documentElement.dataset.theme = settings.theme;
  else delete document.documentElement.dataset.theme;
}

async function showModel() {
  try {
    const { id, shoal } = await api.model(settings.key);
    at("model").textContent = id;
    document.title = `${id} \u2013 Shoal chat`;
    if (!shoal.can_chat) page.chain.textContent = "this model has no chat template: it can't chat";
  } catch (error) {
    page.chain.textContent = error.message;
    if (error.status === 401) openSettings();
  }
}

// --- the page -----------------------------------------------------------------------------

function grow() {
  page.question.style.height = "auto";
  page.question.style.height = `${page.question.scrollHeight}px`;
}

page.ask.addEventListener("submit", (event) => {
  event.preventDefault();
  ask();
});
page.question.addEventListener("input", grow);
page.question.addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  ask();
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape" && !page.settings.open) stop();
  if (event.altKey && event.code === "KeyN") openTalk(store.newTalk());
  if (event.altKey && event.code === "KeyS") openSettings();
});
page.stop.addEventListener("click", stop);
page.settings.addEventListener("close", takeSettings);
page.menu.addEventListener("click", () => {
  const isOpen = page.side.classList.toggle("open");
  page.menu.setAttribute("aria-expanded", String(isOpen));
});
at("new").addEventListener("click", () => openTalk(store.newTalk()));
at("options").addEventListener("click", openSettings);
at("forget").addEventListener("click", () => {
  for (const one of [talk, ...talks]) one.isForgotten = true;
  store.forgetAll();
  settings = store.loadSettings();
  talks = [];
  openSettings();
  openTalk(store.newTalk());
});

showTheme();
showTalks();
showTurns();
showModel();
page.question.focus();
