// Draws what /swarm.json says, again and again while the page is looked at.

const at = (id) => document.getElementById(id);
const KEY = "shoal.settings"; // the chat page keeps an API key there, if there is one
let interval = 2;

function element(name, text, className) {
  const made = document.createElement(name);
  if (text !== undefined) made.textContent = text;
  if (className) made.className = className;
  return made;
}

const short = (peer) => peer.slice(0, 8);
const number = (value) => (value === null || value === undefined ? "\u2013" : value.toLocaleString());
const time = (seconds) => new Date(seconds * 1000).toLocaleTimeString();

function milliseconds(seconds) {
  return seconds ? `${(seconds * 1000).toFixed(seconds < 0.01 ? 2 : 0)} ms` : "\u2013";
}

function kind(server) {
  if (server.error) return "gone";
  if (server.state !== "online") return server.state;
  return server.iterations_per_s > 0 ? "busy" : "online";
}

const WORDS = { gone: "does not answer", busy: "at work", online: "online", joining: "joining", draining: "leaving" };

function lane(server, blocks) {
  const [start, end] = server.blocks;
  const made = element("div", undefined, "lane");
  const bar = element("span", `${start}\u2013${end}`, kind(server));
  bar.style.left = `${(100 * start) / blocks}%`;
  bar.style.width = `${(100 * (end - start)) / blocks}%`;
  made.append(bar);
  return made;
}

function cache(server) {
  if (server.free_tokens === null) return "\u2013";
  const used = server.cache_tokens - server.free_tokens;
  const made = element("span");
  const meter = element("meter");
  meter.max = server.cache_tokens;
  meter.value = used;
  meter.setAttribute("aria-label", "cache in use");
  made.append(meter, ` ${number(used)} of ${number(server.cache_tokens)}`);
  return made;
}

function nearest(server) {
  const [first] = server.nearest;
  if (!first) return "\u2013";
  const made = element("span", `${short(first.peer)}, ${milliseconds(first.rtt_s)}`);
  made.title = server.nearest.map((one) => `${one.peer}: ${milliseconds(one.rtt_s)}`).join("\n");
  return made;
}

const COLUMNS = [
  ["server", (server) => element("code", short(server.peer))],
  ["blocks", lane, "map"],
  ["state", (server) => (server.error
    ? element("span", server.error, "bad")
    : WORDS[kind(server)] + (server.iterations_per_s > 0 ? `, ${server.iterations_per_s.toFixed(1)} passes/s` : ""))],
  ["a block", (server) => milliseconds(server.decode_s_per_block)],
  ["sessions", (server) => number(server.sessions)],
  ["waiting rows", (server) => number(server.queued_tokens)],
  ["cache", cache],
  ["round trip", (server) => milliseconds(server.rtt_s)],
  ["nearest, estimated", nearest],
  ["version", (server) => `${server.version || "?"}, ${server.encodings[0] ?? "?"}${server.is_exact ? ", exact" : ""}`],
];

function table(model) {
  const made = element("table");
  const head = element("tr");
  for (const [name, , className] of COLUMNS) {
    const cell = element("th", name, className);
    cell.scope = "col";
    head.append(cell);
  }
  const top = element("thead");
  top.append(head);
  const body = element("tbody");
  for (const server of model.servers) {
    const row = element("tr");
    row.title = `${server.peer}\n${server.addresses.join("\n")}\n${server.numerics}`;
    for (const [name, cellOf, className] of COLUMNS) {
      const cell = element("td", undefined, className);
      cell.dataset.name = name;
      cell.append(cellOf(server, model.num_blocks));
      row.append(cell);
    }
    body.append(row);
  }
  made.append(top, body);
  return made;
}

function cover(model) {
  const made = element("div", undefined, "cover");
  const copies = Array(model.num_blocks).fill(0);
  for (const server of model.servers) {
    if (server.error || server.state === "joining") continue;
    for (let block = server.blocks[0]; block < server.blocks[1]; block += 1) copies[block] += 1;
  }
  made.setAttribute("role", "img");
  made.setAttribute("aria-label", `servers per block: ${copies.join(", ")}`);
  copies.forEach((count, block) => {
    const cell = element("i", undefined, count ? "" : "missing");
    cell.style.setProperty("--copies", String(Math.min(count, 3)));
    cell.title = `block ${block}: ${count} servers`;
    made.append(cell);
  });
  return made;
}

function legend() {
  const made = element("ul", undefined, "legend");
  for (const [name, word] of Object.entries(WORDS)) {
    const item = element("li", word);
    item.style.setProperty("--colour", `var(--${name})`);
    made.append(item);
  }
  return made;
}

function section(model) {
  const made = element("section");
  const title = element("h2", "Model ");
  title.append(element("code", model.model.slice(0, 16)));
  const missing = model.missing.map(([start, end]) => `[${start}, ${end})`).join(", ");
  const answering = model.servers.filter((server) => !server.error);
  const facts = `${model.num_blocks} blocks, ${answering.length} of ${model.servers.length} servers answer, ` +
    `which hold ${number(answering.reduce((sum, server) => sum + (server.sessions ?? 0), 0))} sessions together`;
  made.append(title, element("p", facts, "faint"));
  made.append(missing
    ? element("p", `Missing: nobody serves blocks ${missing}`, "bad")
    : element("p", "All blocks are served", "faint"));
  const scroll = element("div", undefined, "scroll");
  scroll.tabIndex = 0;
  scroll.setAttribute("role", "region");
  scroll.setAttribute("aria-label", `Servers of model ${model.model.slice(0, 16)}`);
  scroll.append(table(model));
  made.append(cover(model), scroll, legend());
  return made;
}

function showEvents(events) {
  at("quiet").hidden = events.length > 0;
  at("events").replaceChildren(...events.slice(0, 50).map((event) => {
    const item = element("li");
    const when = element("time", time(event.at_s));
    when.dateTime = new Date(event.at_s * 1000).toISOString();
    item.append(when);
    if (event.peer) item.append(element("code", short(event.peer)), " ");
    item.append(element("span", event.text, ["missing", "lost"].includes(event.kind) ? "bad" : ""));
    return item;
  }));
}

// Whoever reads a wide table stays where they are.
function show(models) {
  const before = [...document.querySelectorAll(".scroll")];
  const focused = before.indexOf(document.activeElement);
  at("models").replaceChildren(...models.map(section));
  document.querySelectorAll(".scroll").forEach((scroll, index) => {
    scroll.scrollLeft = before[index]?.scrollLeft ?? 0;
    if (index === focused) scroll.focus({ preventScroll: true });
  });
}

function key() {
  try {
    return JSON.parse(localStorage.getItem(KEY))?.key;
  } catch {
    return undefined;
  }
}

async function look() {
  const found = key();
  const response = await fetch("swarm.json", { headers: found ? { Authorization: `Bearer ${found}` } : {} });
  if (response.status === 401) throw new Error("a key is needed: give it in the chat page's settings");
  if (!response.ok) throw new Error(`the gateway answers ${response.status}`);
  const state = await response.json();
  interval = state.interval_s;
  show(state.models);
  if (!state.models.length) at("models").append(element("p", "No servers.", "bad"));
  showEvents(state.events);
  return state.at_s;
}

async function watch() {
  if (!document.hidden) {
    try {
      const seen = await look();
      at("status").textContent = `as of ${time(seen)}`;
      at("status").className = "";
    } catch (error) {
      at("status").textContent = `no news: ${error.message}`;
      at("status").className = "bad";
    }
  }
  setTimeout(watch, interval * 1000);
}

watch();
