/* The conversation: what was said, requests, the race, and the form. */
"use strict";
const $ = (id) => document.getElementById(id);
const turns = [];  /* the conversation, without the system prompt */
let running = null, model = null, begun = 0, plainRate = NaN;

const headers = () => ({ "Content-Type": "application/json", ...($("key").value && { Authorization: `Bearer ${$("key").value}` }) });
const figure = (value, digits) => (Number.isFinite(value) ? value.toFixed(digits) : "\u2013");
const summary = (tau, rate) => `tau ${figure(tau, 2)} \u00b7 ${figure(rate, 1)} tokens/s`;
const versus = (rate) => (Number.isFinite(rate / plainRate) ? ` \u00b7 ${(rate / plainRate).toFixed(1)}x of plain` : "");

async function connect() {
  const reply = await fetch("v1/models", { headers: headers() }).catch(() => null);
  $("keybox").hidden = !(reply && reply.status === 401);
  if (!reply || !reply.ok) { $("model").textContent = reply && reply.status === 401 ? "needs a key" : "no connection"; return false; }
  model = (await reply.json()).data[0];
  const none = model.method === "none", lookup = model.method === "prompt-lookup";
  $("model").textContent = none ? `${model.id}, without drafts` : `${model.id}, drafter: ${model.method}`;
  $("most").value = Math.min($("most").value, Math.floor(model.max_model_len / 4));  /* leaves room for what was said */
  $("speculative").disabled = none;
  if (none) $("speculative").checked = false;
  $("race").hidden = none;
  $("legend").hidden = none || lookup;
  $("repetitions").hidden = !lookup;
  $("talk").dataset.hint = none ? "" : "Send answers with drafts. Race answers without and with them, and compares the times.";
  return true;
}

/* --- the talk ----------------------------------------------------------------------------------------------- */

function card(kind, text = "") {
  const box = element("article", kind), body = element("div", "text", text);
  box.append(body);
  $("talk").append(box);
  $("talk").scrollTop = $("talk").scrollHeight;
  return body;
}

const note = (body, text, kind = "figures") => keepLow(() => body.closest("article").append(element("p", kind, text)));

/* Forgets the conversation from a turn on, and its cards. */
function forget(turn) {
  turns.length = turn;
  for (const box of $("talk").querySelectorAll("article")) if (Number(box.dataset.turn) >= turn) box.remove();
  keep();
}

function asked(question) {
  const body = card("user", question), box = body.parentElement, turn = turns.length;
  box.dataset.turn = turn;
  turns.push({ role: "user", content: question });
  const row = element("div", "actions");
  row.append(button("edit", () => {
    if (running) return;
    forget(turn);
    $("question").value = question;
    $("question").focus();
  }));
  box.append(row);
}

/* Keeps an answer, whole or not, and offers what can be done with it. */
function answered(body, text, open) {
  const box = body.closest("article"), turn = turns.length;
  box.dataset.turn = turn;
  turns.push({ role: "assistant", content: text });
  keep();
  const row = element("div", "actions");
  row.append(button("copy", () => copy(text)), button("retry", () => {
    if (running) return;
    const question = turns[turn - 1].content;
    forget(turn - 1);
    answer(question);
  }));
  if (open) row.append(Object.assign(button("go on", () => running || turns.length !== turn + 1 || goOn(body, row, text)), { className: "open" }));
  keepLow(() => box.append(row));
}

function goOn(body, row, text) {
  row.remove();
  turns.pop();
  reply(body, new Answer(body, text));
}

const keep = () => sessionStorage.setItem("talk", JSON.stringify({ turns, system: $("system").value }));

function restore() {
  const kept = JSON.parse(sessionStorage.getItem("talk") || "{}");
  $("system").value = kept.system || "";
  for (const { role, content } of kept.turns || []) {
    if (role === "user") asked(content);
    else { const body = card("assistant"); new Answer(body, content); answered(body, content, false); }
  }
}

/* --- requests ----------------------------------------------------------------------------------------------- */

/* Events of a stream; a network chunk may end anywhere. */
async function* events(reader) {
  const decoder = new TextDecoder();
  let rest = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    rest += decoder.decode(value, { stream: true });
    const lines = rest.split("\n");
    rest = lines.pop();
    for (const line of lines) {
      if (!line.startsWith("data: ") || line === "data: [DONE]") continue;
      yield JSON.parse(line.slice(6));
    }
  }
}

function messages(open) {
  const system = $("system").value.trim();
  return [...(system ? [{ role: "system", content: system }] : []), ...turns, ...(open ? [{ role: "assistant", content: open }] : [])];
}

const STREAM = { stream: true, stream_options: { include_usage: true }, return_pieces: true };

/* Asks for an answer to the conversation, or for more of the one that is open. */
async function request(open, speculative, more) {
  const most = Math.max(1, Math.round(Number($("most").value) || 256)), temperature = Number($("temperature").value) || 0;
  const reply = await fetch("v1/chat/completions", {
    method: "POST", headers: headers(), signal: running.signal,
    body: JSON.stringify({ model: model.id, messages: messages(open), speculative, temperature, max_tokens: most, ...more }),
  });
  if (!reply.ok) throw new Error((await reply.json()).error.message);
  return reply;
}

/* Streams one answer into `said`; what is known of it so far is in `got`, also where an error or a stop ends it. */
async function complete(said, got, speculative, seed) {
  const began = performance.now(), answer = await request(said.text, speculative, { seed, ...STREAM });
  Object.assign(got, { tokens: 0, rate: NaN, tau: NaN, reason: null, drafts: "", seconds: 0, times: [] });
  let first = 0, after = 0;
  for await (const chunk of events(answer.body.getReader())) {
    if (chunk.error) throw new Error(chunk.error.message);
    for (const choice of chunk.choices) {
      (choice.pieces || []).forEach(([text], i) => {
        const source = choice.piece_sources[i] && model.method === "prompt-lookup" ? "ngram" : choice.piece_sources[i];
        if (source === "ngram") $("repetitions").hidden = false;
        said.add(text, source);
      });
      if (choice.speculation) {
        const now = performance.now();
        if (!first) first = now;
        else after += choice.speculation.tokens;
        got.tokens += choice.speculation.tokens;
        got.seconds = (now - began) / 1000;
        got.times.push({ seconds: got.seconds, tokens: got.tokens, length: said.text.length });
        got.rate = after / ((now - first) / 1000);
        got.tau = choice.speculation.tau ?? NaN;
        $("live").textContent = summary(got.tau, got.rate) + (speculative ? versus(got.rate) : "");
      }
      if (choice.finish_reason) got.reason = choice.finish_reason;
    }
    if (chunk.usage) {
      const did = chunk.usage.speculation;
      if (did.drafted_tokens) got.drafts = `, ${Math.round(100 * did.accepted_tokens / chunk.usage.completion_tokens)}% of the text came from drafts`;
      got.tau = did.tau ?? NaN;
      got.tokens = chunk.usage.completion_tokens;
    }
  }
  if (!got.reason) throw new Error("the connection ended before the answer did");
  if (!speculative && got.tokens >= 16) plainRate = got.rate;
}

/* Runs what streams answers, one at a time. */
async function run(body, work) {
  const own = ++begun;
  running = new AbortController();
  $("stop").hidden = false;
  $("send").hidden = true;
  $("talk").ariaBusy = "true";
  let failure = null;
  try { await work(); } catch (error) { failure = error; }
  running = null;
  $("stop").hidden = true;
  $("send").hidden = false;
  $("talk").ariaBusy = "false";
  if (own !== begun) return false;  /* another conversation has begun */
  if (failure) note(body, failure.name === "AbortError" ? "stopped" : failure.message, failure.name === "AbortError" ? "figures" : "error");
  return true;
}

/* Streams the answer to the conversation as it is, or goes on with the one that is there. */
async function reply(body, said) {
  const got = {}, speculative = $("speculative").checked;
  const here = await run(body, () => complete(said, got, speculative));
  said.paint();
  if (!here) return;
  if (got.tokens) {
    const rate = summary(got.tau, got.rate) + (speculative ? versus(got.rate) : "");
    note(body, `${speculative ? "with the drafter" : "plain"}: ${got.tokens} tokens, ${rate}${got.drafts}`);
  }
  if (got.reason === "length") note(body, `cut at ${got.tokens} tokens`);
  if (said.text) answered(body, said.text, got.reason !== "stop");
  else unanswered(body);
}

/* Nothing was said: the question goes back to where it was typed, unless something else stands there. */
function unanswered(body) {
  body.hidden = true;
  const { content } = turns.pop();
  delete body.closest("article").dataset.turn;
  if (!$("question").value) $("question").value = content;
  keep();
}

async function answer(question) {
  if (!model && !(await connect())) return;
  asked(question);
  const body = card("assistant");
  await reply(body, new Answer(body));
}

/* The same question without drafts and with them. They would slow each other, so plain decoding runs first, and runs
   again beside the drafted answer as it ran: at the times at which its tokens came. */
async function race(question) {
  if (!model && !(await connect())) return;
  asked(question);
  const box = card("assistant").parentElement, sides = element("div", "sides"), ratio = element("p", "ratio");
  const [left, right] = ["without drafts", "with drafts"].map((name) => {
    const side = element("section", ""), body = element("div", "text");
    side.append(element("h2", "", name), body);
    sides.append(side);
    return body;
  });
  box.replaceChildren(ratio, sides);
  const seed = Math.floor(Math.random() * 2 ** 31), plain = {}, fast = {}, first = new Answer(left);
  let said = new Answer(right), replay = 0;
  const here = await run(right, async () => {
    ratio.textContent = "plain decoding runs first, alone";
    for (const drafts of [false, true]) await (await request("", drafts, { max_tokens: 4 })).json();  /* the first answers of a server are slower */
    await complete(first, plain, false, seed);
    const began = performance.now();
    replay = setInterval(() => keepLow(() => {
      const seconds = (performance.now() - began) / 1000, past = plain.times.filter((one) => one.seconds <= seconds).at(-1);
      left.textContent = past ? first.text.slice(0, past.length) : "";
      if (past && !fast.reason) ratio.textContent = `${((fast.tokens || 0) / past.tokens).toFixed(2)}x of plain after ${seconds.toFixed(1)} s`;
      if (seconds < plain.seconds) return;
      clearInterval(replay);
      first.paint();
    }), 50);
    await complete(said, fast, true, seed);
  });
  said.paint();
  if (!fast.reason) {
    clearInterval(replay);
    first.paint();
    ratio.textContent = "";
  }
  if (!here) return;
  if (fast.reason) {
    const [slow, quick] = [plain, fast].map((one) => one.tokens / one.seconds);
    const times = [plain, fast].map((one) => `${one.tokens} tokens in ${one.seconds.toFixed(2)} s`);
    ratio.textContent = `${(quick / slow).toFixed(2)}x of plain`;
    const same = first.text === said.text ? "the texts are equal" : "the texts differ, as near-ties of two tokens in bfloat16 can make them";
    note(right, `without drafts ${times[0]}, with drafts ${times[1]}, tau ${figure(fast.tau, 2)}; ${same}`);
  }
  if (!said.text) said = first;
  if (said.text) answered(right, said.text, fast.reason !== "stop");
  else unanswered(right);
}

/* --- the form ----------------------------------------------------------------------------------------------- */

function taken() {
  const question = $("question").value.trim();
  if (!question || running) return "";
  $("question").value = "";
  return question;
}

const fine = !matchMedia("(pointer: coarse)").matches;  /* a mouse, or nothing that is known */
$("question").placeholder = fine ? "Say something (Enter sends, Shift+Enter is a new line, Esc stops)" : "Say something";
if (fine) $("question").focus();
$("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  const question = taken();
  if (question) answer(question);
});
$("race").addEventListener("click", () => {
  const question = taken();
  if (question) race(question);
});
$("question").addEventListener("keydown", (event) => {
  if (fine && event.key === "Enter" && !event.shiftKey && !event.isComposing) { event.preventDefault(); $("ask").requestSubmit(); }
});
const stop = () => running && running.abort();
$("stop").addEventListener("click", stop);
document.addEventListener("keydown", (event) => event.key === "Escape" && stop());
$("reset").addEventListener("click", () => {
  stop();
  begun += 1;
  forget(0);
  $("talk").textContent = "";
});
$("export").addEventListener("click", () => {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([`${JSON.stringify({ messages: messages("") })}\n`], { type: "application/jsonl" }));
  link.download = "conversation.jsonl";
  link.click();
});
$("system").addEventListener("change", keep);
$("key").addEventListener("change", connect);
/* A window that gets smaller, by a phone's keyboard or the settings, keeps the end in view. A browser reports a scroll
   before a change of size of the same frame, and such a scroll says nothing about where the reader was. */
let low = true, height = $("talk").clientHeight;
$("talk").addEventListener("scroll", () => { if ($("talk").clientHeight === height) low = isLow(); });
new ResizeObserver(() => {
  if (low) $("talk").scrollTop = $("talk").scrollHeight;
  low = isLow();
  height = $("talk").clientHeight;
}).observe($("talk"));
restore();
connect().then(() => {
  /* A question in the address, so that a page can be linked to with one: #Why is the sky blue? */
  let question = "";
  try { question = decodeURIComponent(location.hash.slice(1)).trim(); } catch { /* no text */ }
  if (question && !turns.length) answer(question);
});
