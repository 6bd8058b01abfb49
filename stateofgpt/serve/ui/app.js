// The page of `sog serve`. Talks to its own server only. A model's words reach the document as text, or as HTML that
// the server has sanitised, through the one Trusted Types policy below.
"use strict";
const $ = (id) => document.getElementById(id);
const policy = window.trustedTypes
  ? trustedTypes.createPolicy("answer", { createHTML: (html) => html })
  : { createHTML: (html) => html };
const EXAMPLES = [
  "What is 4729 * 386?",
  "How many times as many people live in California as in Alaska?",
  "What is 4729 + 386? Think step by step.",
  "Invent a name.",
  "Who are you?",
];

let conversation = null; // id
let messages = []; // every branch, in the order of writing
let chosen = {}; // parent id -> id of the child that is shown
let generation = null; // id of the answer being written
let controller = null;

function make(tag, props = {}, ...children) {
  const node = document.createElement(tag);
  for (const [key, value] of Object.entries(props)) {
    if (key.startsWith("on")) node.addEventListener(key.slice(2), value);
    else if (key in node && key !== "list") node[key] = value;
    else node.setAttribute(key, value);
  }
  node.append(...children.filter((child) => child !== null && child !== undefined));
  return node;
}

function icon(name) {
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  const use = document.createElementNS("http://www.w3.org/2000/svg", "use");
  use.setAttribute("href", "#i-" + name);
  svg.setAttribute("aria-hidden", "true");
  svg.append(use);
  return svg;
}

// -- the server ------------------------------------------------------------------------------------------------------

// Only a server that was started with keys asks for one; it is forgotten with the tab.
function headers() {
  const key = sessionStorage.getItem("key");
  return { "content-type": "application/json", ...(key ? { authorization: "Bearer " + key } : {}) };
}

let asking = null; // one question for a key, however many requests need it
function askForKey() {
  asking ??= Promise.resolve(prompt("This server asks for an API key.")).then((key) => {
    if (key) sessionStorage.setItem("key", key.trim());
    setTimeout(() => { asking = null; }, 1000);
    return Boolean(key);
  });
  return asking;
}

async function call(path, body, signal) {
  const options = { headers: headers() };
  if (body !== undefined) Object.assign(options, { method: "POST", body: JSON.stringify(body), signal });
  const response = await fetch(path, options);
  if (response.ok) return response;
  if (response.status === 401 && (await askForKey())) return call(path, body, signal);
  let message = response.statusText;
  try { message = (await response.json()).error.message; } catch { /* no JSON: the status line has to do */ }
  throw Object.assign(new Error(message), { status: response.status });
}

// The same key every time: however often it arrives, it is one event.
async function keepTrying(path, body) {
  for (let attempt = 0; ; attempt++) {
    try {
      return await (await call(path, body)).json();
    } catch (error) {
      if (attempt >= 4 || (error.status && error.status !== 503)) throw error;
      await new Promise((resolve) => setTimeout(resolve, 400 * 2 ** attempt));
    }
  }
}

async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    text += value;
    const frames = text.split("\n\n");
    text = frames.pop();
    for (const frame of frames) if (frame.startsWith("data: ")) yield JSON.parse(frame.slice(6));
  }
}

// -- the tree --------------------------------------------------------------------------------------------------------

const children = (parent) => messages.filter((message) => message.parent === parent);

function path() {
  const shown = [];
  for (let parent = null; ;) {
    const options = children(parent);
    if (!options.length) return shown;
    const next = options.find((message) => message.id === chosen[parent]) || options[options.length - 1];
    shown.push({ message: next, options });
    if (next.id === null) return shown;
    parent = next.id;
  }
}

// -- drawing ---------------------------------------------------------------------------------------------------------

function say(text) { $("status").textContent = text; }

function toolLine(part) {
  const result = part.result === null ? "…" : part.result;
  return make("details", { className: "tool" },
    make("summary", {}, make("b", {}, part.name), make("span", {}, `${part.arguments} → ${result}`)),
    make("dl", {}, make("dt", {}, "asked"), make("dd", {}, part.arguments), make("dt", {}, "answer"), make("dd", {}, result)));
}

function words(message) {
  const box = make("div", { className: "words" });
  if (message.role === "user") { box.textContent = message.text; return box; }
  for (const part of message.parts) {
    if (part.type === "tool") { box.append(toolLine(part)); continue; }
    const html = document.createElement("div");
    html.innerHTML = policy.createHTML(part.html);
    box.append(...html.childNodes);
  }
  return box;
}

function button(name, label, act, extra = {}) {
  return make("button", { type: "button", title: label, "aria-label": label, onclick: act, disabled: !!generation, ...extra }, icon(name));
}

function bar(message, options, box) {
  const at = options.indexOf(message);
  const go = (step) => () => { chosen[message.parent] = options[at + step].id; draw(); focusBar(options[at + step]); };
  const row = make("div", { className: "bar", role: "group", "aria-label": "This answer" });
  if (options.length > 1) {
    row.append(
      button("left", "Previous answer", go(-1), { disabled: !!generation || at === 0 }),
      make("span", { className: "of", "aria-label": `answer ${at + 1} of ${options.length}` }, `${at + 1}/${options.length}`),
      button("right", "Next answer", go(1), { disabled: !!generation || at === options.length - 1 }));
  }
  if (message.id !== null) {
    row.append(
      button("up", "Good answer", () => thumb(message, "up", box), { className: "up", "aria-pressed": String(message.rating === "up") }),
      button("down", "Bad answer", () => thumb(message, "down", box), { className: "down", "aria-pressed": String(message.rating === "down") }),
      button("pen", "Correct this answer", () => form(message, box, true).querySelector("textarea").focus()));
  }
  row.append(
    button("copy", "Copy", () => navigator.clipboard.writeText(message.text).then(() => say("Copied."), () => say("The browser did not allow copying."))),
    button("again", "Another answer (this one stays)", () => regenerate(message.id === null ? message.parent : message.id)));
  if (message.partial) row.append(make("span", { className: "mark" }, "stopped early"));
  return row;
}

function turn({ message, options }) {
  const box = make("article", { className: "turn " + (message.role === "user" ? "user" : "answer") }, words(message));
  box.dataset.id = message.id;
  box.setAttribute("aria-label", message.role === "user" ? "You" : "Assistant");
  if (message.role === "user") return box;
  box.append(bar(message, options, box));
  if (message.correction) box.append(make("p", { className: "kept" }, make("small", {}, "You corrected it to"), message.correction));
  else if (message.reason) box.append(make("p", { className: "note" }, "You said: " + message.reason));
  return box;
}

function draw() {
  const shown = path();
  $("log").replaceChildren(...shown.map(turn));
  const last = shown[shown.length - 1];
  if (last && last.message.role === "user" && !generation) {
    $("log").append(make("p", { className: "note" }, "No answer was kept. ",
      make("button", { type: "button", onclick: () => regenerate(last.message.id) }, "Answer now")));
  }
  $("welcome").hidden = shown.length > 0 || generation !== null;
}

function focusBar(message) {
  const found = document.querySelector(`[data-id="${CSS.escape(message.id)}"] .bar button:not(:disabled)`);
  if (found) found.focus();
}

function nearEnd() { return innerHeight + scrollY > document.documentElement.scrollHeight - 140; }
function toEnd() { scrollTo(0, document.documentElement.scrollHeight); }

async function showModel() {
  try {
    const model = await (await call("/api/model")).json();
    $("name").textContent = model.name;
    document.title = model.name + " · stateofgpt";
    $("lineage").replaceChildren(...model.lineage.map((stage) => make("li", {}, stage)));
    const { up, down, corrections, comparisons } = model.feedback;
    const several = (n, one) => `${n} ${one}${n === 1 ? "" : "s"}`;
    const given = [up && `${up} up`, down && `${down} down`, corrections && several(corrections, "correction")];
    const follow = nearEnd();
    $("learned").replaceChildren(
      up + down + corrections === 0 ? "Your thumbs and corrections are kept on this machine. "
        : `${given.filter(Boolean).join(", ")}: ${several(comparisons, "comparison")} so far. `,
      make("code", {}, "sog improve"), " trains the next model from them.");
    if (follow) toEnd();
  } catch { /* the counts are a nicety */ }
}

// -- asking ----------------------------------------------------------------------------------------------------------

async function write(address, body, above) {
  controller = new AbortController();
  generation = "starting";
  $("send").hidden = true;
  $("stop").hidden = false;
  say("");
  draw();
  const box = make("div", { className: "words waiting" });
  const live = make("article", { className: "turn answer", "aria-label": "Assistant", "aria-busy": "true" }, box);
  $("log").append(...above, live);
  $("welcome").hidden = true;
  toEnd();
  let text = null, tool = null, fault = null;
  const notes = [];
  try {
    const response = await call(address, body, controller.signal);
    for await (const event of events(response)) {
      const follow = nearEnd();
      if (event.type === "start") {
        generation = event.generation;
        conversation = event.conversation;
        remember();
      } else if (event.type === "delta") {
        if (!text) box.append((text = make("div", { className: "live" })));
        text.append(event.text);
      } else if (event.type === "tool_call") {
        tool = { ...event, result: null, node: toolLine({ ...event, result: null }) };
        box.append(tool.node);
        text = null;
      } else if (event.type === "tool_result" && tool) {
        tool.node.replaceWith(toolLine({ ...tool, result: event.result }));
      } else if (event.type === "note") notes.push(["note", event.text]);
      else if (event.type === "error") notes.push(["fault", event.message]);
      else if (event.type === "done") await finish(event);
      if (follow) toEnd();
    }
  } catch (error) {
    fault = error;
    if (error.name !== "AbortError") notes.push(["fault", error.status ? error.message : "The connection to the server was lost: is it still running?"]);
  }
  generation = controller = null;
  $("send").hidden = false;
  $("stop").hidden = true;
  draw();
  for (const [kind, line] of notes) $("log").append(make("p", { className: kind }, line));
  toEnd();
  $("question").focus({ preventScroll: true });
  showModel();
  return fault;
}

async function finish(event) {
  const live = event.message;
  try {
    messages = (await (await call("/api/conversations/" + encodeURIComponent(conversation))).json()).messages;
  } catch { /* nothing could be stored: what is in the page has to do */ }
  if (live.id === null && live.parts.length) messages.push(live);
  if (live.id !== null || live.parts.length) chosen[live.parent] = live.id;
}

async function ask(text) {
  if (generation || !text.trim()) return;
  const shown = path();
  while (shown.length && (shown[shown.length - 1].message.role === "user" || shown[shown.length - 1].message.id === null)) shown.pop();
  const parent = shown.length ? shown[shown.length - 1].message.id : null;
  $("question").value = "";
  grow();
  delete chosen[parent];
  const bubble = make("article", { className: "turn user", "aria-label": "You" }, make("div", { className: "words" }, text));
  const fault = await write("/api/chat", { conversation, parent, content: text }, [bubble]);
  if (fault && fault.name !== "AbortError" && !$("question").value) { $("question").value = text; grow(); }
}

function regenerate(id) {
  if (generation) return;
  const target = messages.find((message) => message.id === id);
  const question = target && target.role === "user" ? target.id : target && target.parent;
  messages.filter((message) => message.id === null).forEach((message) => messages.splice(messages.indexOf(message), 1));
  const keep = path().findIndex(({ message }) => message.id === question);
  write("/api/regenerate", { message: id }, []);
  [...$("log").children].slice(keep + 1, -1).forEach((node) => node.remove());
}

function stop() {
  if (!generation) return;
  if (generation === "starting") controller.abort();
  else call("/api/stop", { generation }).catch(() => controller && controller.abort());
}

// -- feedback --------------------------------------------------------------------------------------------------------

async function tell(message, event, done) {
  try {
    const verdict = await keepTrying("/api/feedback", { message: message.id, key: crypto.randomUUID(), ...event });
    Object.assign(message, { rating: verdict.rating, reason: verdict.reason, correction: verdict.correction });
    draw();
    say(done);
    showModel();
    return true;
  } catch (error) {
    say("Not stored: " + error.message);
    return false;
  }
}

async function thumb(message, rating) {
  const undo = message.rating === rating;
  const event = undo ? { retracted: true } : { rating };
  if (!(await tell(message, event, undo ? "Taken back." : "Stored. Press again to take it back."))) return;
  const box = document.querySelector(`[data-id="${CSS.escape(message.id)}"]`);
  if (!undo) form(message, box, rating === "down");
  box.querySelector(".bar ." + rating).focus();
}

function form(message, box, correcting) {
  box.querySelector(".say")?.remove();
  const reason = make("input", { type: "text", maxLength: 2000, value: message.reason, placeholder: "optional" });
  const better = make("textarea", { maxLength: 16000, value: message.correction || "", placeholder: "optional: the answer you wanted" });
  const panel = make("form", { className: "say", "aria-label": "More about this answer", onsubmit: async (event) => {
    event.preventDefault();
    const given = {};
    if (reason.value.trim()) given.reason = reason.value;
    if (correcting && better.value.trim()) given.correction = better.value;
    if (Object.keys(given).length) await tell(message, given, "Stored. Thank you.");
    else panel.remove();
  } },
    make("label", {}, message.rating === "up" ? "What was good about it?" : "What was wrong with it?", reason),
    correcting ? make("label", {}, "What should it have said?", better) : null,
    make("div", { className: "row" },
      make("button", { type: "button", onclick: () => panel.remove() }, "Skip"),
      make("button", { type: "submit", className: "go" }, "Save")));
  panel.addEventListener("keydown", (event) => { if (event.key === "Escape") { event.stopPropagation(); panel.remove(); } });
  box.append(panel);
  panel.scrollIntoView({ block: "nearest" });
  return panel;
}

// -- the page --------------------------------------------------------------------------------------------------------

function remember() {
  history.replaceState(null, "", conversation ? "#" + conversation : location.pathname);
  try { localStorage.setItem("conversation", conversation || ""); } catch { /* private windows may refuse */ }
}

async function open(id) {
  conversation = id;
  messages = [];
  chosen = {};
  if (id) {
    try {
      messages = (await (await call("/api/conversations/" + encodeURIComponent(id))).json()).messages;
    } catch (error) {
      conversation = null;
      if (error.status !== 404) say(error.message);
    }
  }
  follow(messages[messages.length - 1]);
  remember();
  draw();
  toEnd();
}

// Show the branch that `message` is on.
function follow(message) {
  for (let at = message; at; at = messages.find((other) => other.id === at.parent)) chosen[at.parent] = at.id;
}

function grow() {
  const field = $("question");
  field.style.height = "auto";
  field.style.height = field.scrollHeight + "px";
}

$("ask").addEventListener("submit", (event) => { event.preventDefault(); ask($("question").value); });
$("question").addEventListener("input", grow);
$("question").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) { event.preventDefault(); ask(event.target.value); }
});
document.addEventListener("keydown", (event) => { if (event.key === "Escape") stop(); });
$("stop").addEventListener("click", stop);
$("new").addEventListener("click", () => { if (controller) controller.abort(); open(null); $("question").focus(); });
addEventListener("hashchange", () => { const id = location.hash.slice(1) || null; if (id !== conversation) open(id); });
$("examples").append(...EXAMPLES.map((text) => make("button", { type: "button", onclick: () => ask(text) }, text)));

let last = location.hash.slice(1);
try { last = last || localStorage.getItem("conversation"); } catch { /* private windows may refuse */ }
open(last || null);
showModel();
