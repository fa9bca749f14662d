// A little Markdown as elements: code, emphasis, lists stay as they are written. Only text nodes
// are made, so that an answer can't bring markup of its own.

const FENCE = /^```([^\n`]*)\n([\s\S]*?)(?:\n```[^\S\n]*(?:\n|$)|$)/m;
const INLINE = /(`[^`\n]+`)|(\*\*[^*\n]+\*\*)/;

function element(name, text, className) {
  const made = document.createElement(name);
  if (text !== undefined) made.textContent = text;
  if (className) made.className = className;
  return made;
}

function inline(parent, text) {
  let rest = text;
  for (let found = INLINE.exec(rest); found; found = INLINE.exec(rest)) {
    parent.append(rest.slice(0, found.index));
    const [whole, code] = found;
    parent.append(code ? element("code", code.slice(1, -1)) : element("strong", whole.slice(2, -2)));
    rest = rest.slice(found.index + whole.length);
  }
  parent.append(rest);
}

function paragraphs(parent, text) {
  for (const part of text.split(/\n{2,}/)) {
    if (!part.trim()) continue;
    const made = element("p");
    inline(made, part.replace(/^\n|\n$/g, ""));
    parent.append(made);
  }
}

export function render(parent, text) {
  parent.replaceChildren();
  let rest = text;
  for (let found = FENCE.exec(rest); found; found = FENCE.exec(rest)) {
    paragraphs(parent, rest.slice(0, found.index));
    const block = element("pre");
    block.tabIndex = 0;
    block.append(element("code", found[2]));
    parent.append(block);
    rest = rest.slice(found.index + found[0].length);
  }
  paragraphs(parent, rest);
}

export { element };
