// What stays in the browser: conversations and settings. Nothing is sent anywhere from here.

const TALKS = "shoal.talks";
const SETTINGS = "shoal.settings";
const TALKS_MAX = 100; // a browser keeps some megabytes per site

const DEFAULTS = {
  system: "", temperature: 0.7, top_p: 0.95, max_tokens: null, seed: null, key: "", theme: "",
};

function read(name, fallback) {
  try {
    return JSON.parse(localStorage.getItem(name)) ?? fallback;
  } catch {
    return fallback; // private windows, or written by something else
  }
}

function write(name, value) {
  try {
    localStorage.setItem(name, JSON.stringify(value));
    return true;
  } catch {
    return false; // full, or not allowed
  }
}

export function loadSettings() {
  return { ...DEFAULTS, ...read(SETTINGS, {}) };
}

export function saveSettings(settings) {
  write(SETTINGS, settings);
}

export function loadTalks() {
  const talks = read(TALKS, []);
  return Array.isArray(talks) ? talks.filter((talk) => Array.isArray(talk?.turns)) : [];
}

// Newest first. Makes room by forgetting the oldest; says whether anything could be kept.
export function saveTalks(talks) {
  const kept = talks.filter((talk) => talk.turns.length).slice(0, TALKS_MAX);
  while (!write(TALKS, kept)) {
    if (kept.length <= 1) return false;
    kept.pop();
  }
  return true;
}

export function newTalk() {
  return { id: crypto.getRandomValues(new Uint32Array(2)).join("-"), turns: [] };
}

export function title(talk) {
  const first = talk.turns.find((turn) => turn.role === "user");
  return first ? first.content.trim().slice(0, 80) : "New conversation";
}

export function forgetAll() {
  try {
    localStorage.removeItem(TALKS);
    localStorage.removeItem(SETTINGS);
  } catch {
    // nothing was kept then
  }
}
