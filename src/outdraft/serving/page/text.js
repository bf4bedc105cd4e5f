/* An answer's text: Markdown made safe, with drafted tokens tinted. */
"use strict";
const plainly = (text) => text.replace(/[&<>"]/g, (letter) => `&#${letter.charCodeAt(0)};`).replace(/\n/g, "<br>");
const markdown = new marked.Marked({
  gfm: true, breaks: true,
  renderer: { html: ({ text }) => plainly(text), image: ({ text, href }) => plainly(text || href) },
});
const CLEAN = {
  ALLOWED_TAGS: "a b blockquote br code del em h1 h2 h3 h4 h5 h6 hr i li ol p pre strong table tbody td th thead tr ul".split(" "),
  ALLOWED_ATTR: ["href", "start"],
  ALLOWED_URI_REGEXP: /^(?:https?|mailto):/i,
  RETURN_DOM_FRAGMENT: true,
};

function element(tag, kind, text = "") {
  const made = document.createElement(tag);
  made.className = kind;
  made.textContent = text;
  return made;
}

function button(name, act) {
  const made = element("button", "", name);
  made.type = "button";
  made.addEventListener("click", act);
  return made;
}

function copy(text) {
  if (navigator.clipboard) { navigator.clipboard.writeText(text); return; }
  const area = document.body.appendChild(element("textarea", ""));  /* pages that are not from this machine or https */
  area.value = text;
  area.select();
  document.execCommand("copy");
  area.remove();
}

function isLow() {
  const talk = document.getElementById("talk");
  return talk.scrollHeight - talk.scrollTop - talk.clientHeight < 80;
}

/* Keeps the end of the talk in view while something is added to it, unless the reader has scrolled up. */
function keepLow(change) {
  const talk = document.getElementById("talk"), low = isLow();
  change();
  if (low) talk.scrollTop = talk.scrollHeight;
}

/* A text that grows, shown as Markdown, in which drafted tokens are tinted. */
class Answer {
  constructor(body, text = "") {
    Object.assign(this, { body, text, sources: new Array(text.length).fill(null), due: 0 });
    if (text) this.paint();
  }

  add(text, source) {
    this.text += text;
    for (let i = 0; i < text.length; i++) this.sources.push(source);
    if (!this.due) this.due = setTimeout(() => this.paint(), 50);
  }

  paint() {
    clearTimeout(this.due);
    this.due = 0;
    keepLow(() => {
      this.body.replaceChildren(DOMPurify.sanitize(markdown.parse(this.text), CLEAN));
      if (this.sources.some((source) => source)) this.tint();
      for (const link of this.body.querySelectorAll("a")) Object.assign(link, { target: "_blank", rel: "noreferrer" });
      for (const block of this.body.querySelectorAll("pre")) block.append(button("copy", () => copy(block.querySelector("code").textContent)));
    });
  }

  /* Markdown leaves characters out and keeps the order of the others: each is found after the one before it. */
  tint() {
    const walker = document.createTreeWalker(this.body, NodeFilter.SHOW_TEXT), nodes = [];
    while (walker.nextNode()) nodes.push(walker.currentNode);
    let at = 0;
    for (const node of nodes) {
      const runs = [];
      for (let i = 0; i < node.data.length; i++) {
        const letter = node.data[i], space = !letter.trim(), found = space ? -1 : this.text.indexOf(letter, at);
        if (found >= 0 && found - at < 400) at = found + 1;
        const source = space ? null : this.sources[Math.max(0, at - 1)], last = runs.at(-1);
        if (last && (last.source === source || space)) last.text += letter;
        else runs.push({ source, text: letter });
      }
      if (!runs.some((run) => run.source) || !node.data.trim()) continue;
      node.replaceWith(...runs.map(({ source, text }) => {
        if (!source) return text;
        const mark = document.createElement("mark");
        mark.className = source;
        mark.textContent = text;
        return mark;
      }));
    }
  }
}
