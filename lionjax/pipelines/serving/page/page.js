"use strict";
// The page of a served model. It asks /v1/chat/completions and keeps everything else in this tab.
const PALETTE = ["#e69f00", "#009e73", "#cc79a7", "#d55e00", "#56b4e9", "#0072b2", "#b3a000"];
const CLICK_PIXELS = 5;
const TYPES = ["image/png", "image/jpeg", "image/webp"];
const at = id => document.getElementById(id);
const [image, overlay, log, question] = ["image", "overlay", "log", "question"].map(at);
const talks = [];
let settings = {}, picture = null, talk = null, regions = [], corner = null, running = null, shown = null, editing = null;

function element(name, fields = {}, ...children) {
  const made = Object.assign(document.createElement(name), fields);
  made.append(...children);
  return made;
}
function shape(name, fields) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(fields)) made.setAttribute(key, value);
  return made;
}
function warn(sentence) {
  at("warning").textContent = sentence;
  at("warning").hidden = !sentence;
}
const clamp = value => Math.min(Math.max(value, 0), 1);

// ------------------------------------------------------------------ the image

async function pixelsOf(file) {  // width times height by the header of a PNG or JPEG, 0 if it is not known
  const view = new DataView(await file.slice(0, 1 << 18).arrayBuffer());
  if (view.byteLength > 24 && view.getUint32(0) === 0x89504e47) return view.getUint32(16) * view.getUint32(20);
  if (view.byteLength < 4 || view.getUint16(0) !== 0xffd8) return 0;
  for (let place = 2; place + 9 < view.byteLength;) {
    const marker = view.getUint16(place);
    if (marker >= 0xffc0 && marker <= 0xffcf && ![0xffc4, 0xffc8, 0xffcc].includes(marker))
      return view.getUint16(place + 5) * view.getUint16(place + 7);
    place += 2 + view.getUint16(place + 2);
  }
  return 0;
}
function readUrl(file) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result);
    reader.onerror = () => reject(new Error(`${file.name} cannot be read`));
    reader.readAsDataURL(file);
  });
}
async function openFile(file) {  // an image takes the place of the one before only if it can be shown
  if (!file) return false;
  if (!TYPES.includes(file.type)) return warn(`${file.name} is not JPEG, PNG or WebP; choose another image`), false;
  const pixels = await pixelsOf(file);
  if (pixels > settings.max_pixels)
    return warn(`${file.name} has ${pixels / 1e6} million pixels, and at most ${settings.max_pixels / 1e6} are read; shrink it first`), false;
  let url;
  try {
    url = await readUrl(file);
    const probe = new Image();
    probe.src = url;
    await probe.decode();
  } catch {
    return warn(`${file.name} cannot be shown, so it may be damaged; choose another image`), false;
  }
  stop();
  picture = {url, name: file.name || "pasted image"};
  image.src = url;
  await image.decode().catch(() => {});
  image.hidden = false;
  overlay.removeAttribute("hidden");
  at("drop").hidden = true;
  at("stage").classList.add("full");
  warn("");
  beginTalk();
  return true;
}
function beginTalk() {
  talk = {picture, turns: [], replaced: []};
  [regions, corner, shown, editing] = [[], null, null, null];
  if (talks.some(one => one.turns.length)) {
    const text = picture ? `new talk about ${picture.name}` : "new talk";
    log.append(element("div", {className: "divider", textContent: text}));
  }
  talks.push(talk);
  showRegions();
}
function layOut() {  // the image fills the stage, and the overlay covers it
  if (image.hidden) return;
  const scale = Math.min(at("stage").clientWidth / image.naturalWidth, at("stage").clientHeight / image.naturalHeight);
  Object.assign(image.style, {width: `${image.naturalWidth * scale}px`, height: `${image.naturalHeight * scale}px`});
  const {offsetLeft: left, offsetTop: top, clientWidth: width, clientHeight: height} = image;
  Object.assign(overlay.style, {left: `${left}px`, top: `${top}px`, width: `${width}px`, height: `${height}px`});
}

// ------------------------------------------------------------------ regions of the question

function place(event) {
  const frame = overlay.getBoundingClientRect();
  return [clamp((event.clientX - frame.left) / frame.width), clamp((event.clientY - frame.top) / frame.height)];
}
function boxOf([x, y], [u, v]) {
  const box = [Math.min(x, u), Math.min(y, v), Math.max(x, u), Math.max(y, v)].map(edge => Math.round(edge * 1000) / 1000);
  return box[2] > box[0] && box[3] > box[1] ? box : null;
}
function onDown(event) {
  if (event.button || !settings.reads_boxes) return;
  event.preventDefault();
  overlay.setPointerCapture(event.pointerId);
  const start = place(event), mode = document.querySelector("[name=mode]:checked").value;
  const moved = other => Math.hypot(other.clientX - event.clientX, other.clientY - event.clientY) > CLICK_PIXELS;
  overlay.onpointermove = other => mode === "box" && moved(other) && showRegions(boxOf(start, place(other)));
  overlay.onpointercancel = () => endDrag();
  overlay.onpointerup = other => {
    endDrag();
    if (mode === "point") regions.push({point: start.map(edge => Math.round(edge * 1000) / 1000)});
    else {
      const from = moved(other) ? start : corner;
      const box = from && boxOf(from, place(other));
      if (box) regions.push({box});
      corner = moved(other) || box ? null : place(other);  // a second click on the same line is a new first corner
    }
    showRegions();
  };
}
function endDrag() {
  overlay.onpointermove = overlay.onpointerup = overlay.onpointercancel = null;
  showRegions();
}
function regionShape(region) {
  if (region.point) return ellipse(region.point);
  const [x, y, u, v] = region.box;
  return shape("rect", {x, y, width: u - x, height: v - y, class: "asked"});
}
function ellipse([x, y]) {
  const size = 7;
  return shape("rect", {
    x: x - size / overlay.clientWidth, y: y - size / overlay.clientHeight, rx: 1, ry: 1,
    width: 2 * size / overlay.clientWidth, height: 2 * size / overlay.clientHeight, class: "asked",
  });
}
function showRegions(drawn = null) {
  layOut();
  overlay.replaceChildren(...(shown ? shown.places.map(one => one.shape) : []));
  const asked = shown && !regions.length && !drawn && !corner ? shown.turn.regions : regions;
  overlay.append(...asked.map(regionShape), ...(drawn ? [regionShape({box: drawn})] : []), ...(corner ? [ellipse(corner)] : []));
  at("regions").replaceChildren(...regions.map((region, number) => element("button", {
    type: "button", textContent: `${region.point ? "point" : "box"} ${(region.point || region.box).join(", ")} ×`,
    title: "Remove this region from the question",
    onclick: () => { regions.splice(number, 1); showRegions(); },
  })));
}

// ------------------------------------------------------------------ asking

function message(turn, first) {
  const content = [{type: "text", text: turn.question}];
  if (first && talk.picture) content.push({type: "image_url", image_url: {url: talk.picture.url}});
  return {role: "user", content, ...(turn.regions.length ? {regions: turn.regions} : {})};
}
function requestBody(turn, before) {
  const turns = [...(at("remembers").checked ? before.filter(one => one.answer) : []), turn];
  const messages = turns.flatMap((one, number) =>
    [message(one, !number), ...(one === turn ? [] : [{role: "assistant", content: one.answer}])]);
  const tags = at("tags").value.split(",").map(tag => tag.trim()).filter(Boolean);
  return {
    model: settings.name, messages, stream: true, temperature: Number(at("temperature").value),
    max_tokens: Number(at("length").value), ...(settings.uses_tags && tags.length ? {tags} : {}),
  };
}
async function* events(reply) {
  const reader = reply.body.pipeThrough(new TextDecoderStream()).getReader();
  for (let text = "";;) {
    const {value, done} = await reader.read();
    if (done) return;
    const lines = (text + value).split("\n");
    text = lines.pop();
    for (const line of lines)
      if (line.startsWith("data: ") && line !== "data: [DONE]") yield JSON.parse(line.slice(6));
  }
}
async function ask(text, asked) {
  warn("");
  if (!text.trim()) return warn("Enter a question.");
  if (settings.reads_images && !picture) return warn("Choose an image first.");
  if (!talk) beginTalk();
  const replaced = editing === null ? [] : talk.turns.splice(editing);  // kept for the file, and for a request that fails
  replaced.forEach(old => old.row.remove());
  talk.replaced.push(...replaced);
  editing = null;
  const turn = {question: text.trim(), regions: asked, answer: "", places: [], vote: null, settings: {}};
  const body = requestBody(turn, talk.turns), own = talk;
  turn.settings = {temperature: body.temperature, max_tokens: body.max_tokens};
  own.turns.push(turn);
  addRow(turn, own);
  [question.value, regions, corner] = ["", [], null];
  show(turn);
  const control = running = new AbortController();
  setRunning(true);
  try {
    const headers = {"content-type": "application/json"};
    if (settings.has_key) headers.authorization = `Bearer ${at("key").value}`;
    const reply = await fetch("/v1/chat/completions", {method: "POST", headers, body: JSON.stringify(body), signal: control.signal});
    if (!reply.ok) throw new Error((await reply.json().catch(() => null))?.error?.message ?? `the server answers with status ${reply.status}`);
    for await (const event of events(reply)) {
      if (event.error) throw new Error(event.error.message);
      const delta = event.choices[0]?.delta ?? {};
      turn.answer = delta.text ?? turn.answer + (delta.content ?? "");
      if (delta.regions) Object.assign(turn, {places: delta.regions, tags: delta.tags, refined: delta.refined});
      turn.finish = event.choices[0]?.finish_reason ?? turn.finish;
      fillRow(turn);
    }
  } catch (error) {
    if (control.signal.aborted) turn.finish = "stopped";
    else {
      warn(error instanceof TypeError ? "The server does not answer; try again." : error.message);
      if (!turn.answer) undo(turn, own, replaced);
    }
  }
  if (running === control) {
    running = null;
    setRunning(false);
  }
  if (own.turns.includes(turn)) fillRow(turn);
}
function undo(turn, own, replaced) {  // a question that failed goes back to where it was entered
  own.turns.splice(own.turns.indexOf(turn), 1, ...replaced);
  own.replaced = own.replaced.filter(old => !replaced.includes(old));
  turn.row.replaceWith(...replaced.map(old => old.row));
  if (!question.value) question.value = turn.question;
  if (own === talk && !regions.length) regions = turn.regions;
  shown = null;
  show(talk.turns.at(-1));
}
function stop() {
  running?.abort();
}
function setRunning(is) {
  at("stop").hidden = !is;
  at("send").hidden = is;
  at("retry").hidden = is || !talk?.turns.length;
}

// ------------------------------------------------------------------ the talk

function addRow(turn, own) {
  const button = (name, title, onclick) => element("button", {type: "button", textContent: name, title, onclick});
  const vote = value => event => {
    event.stopPropagation();
    turn.vote = turn.vote === value ? null : value;
    fillRow(turn);
  };
  turn.votes = [button("Good", "Vote for this answer", vote("good")), button("Bad", "Vote against this answer", vote("bad"))];
  const edit = button("Edit", "Change this question; it and what follows are asked anew", event => {
    event.stopPropagation();
    if (own !== talk) return warn("This talk is over; ask again below.");
    [editing, question.value, regions] = [talk.turns.indexOf(turn), turn.question, [...turn.regions]];
    question.focus();
    showRegions();
  });
  turn.parts = ["question", "answer", "more"].map(className => element("div", {className}));
  turn.row = element("div", {className: "turn", onclick: () => own === talk && show(turn)}, ...turn.parts, element("div", {className: "row"}, ...turn.votes, edit));
  log.append(turn.row);
  fillRow(turn);
}
function fillRow(turn) {
  const [asked, answer, more] = turn.parts;
  asked.textContent = turn.question + turn.regions.map(one => one.point ? ` (${one.point.join(", ")})` : ` [${one.box.join(", ")}]`).join("");
  answer.replaceChildren(...words(turn));
  const notes = [];
  if (turn.finish === "length") notes.push("(cut at the length that is set)");
  if (turn.finish === "stopped") notes.push("(stopped)");
  if (turn.tags) notes.push(`Tags: ${turn.tags.join(", ")}`);
  if (turn.refined) notes.push(`Found by the refiner: ${turn.refined.names.map((name, k) => `${name} (${turn.refined.scores[k].toFixed(2)})`).join(", ") || "no box"}`);
  more.textContent = notes.join("\n");
  turn.votes.forEach(one => one.classList.toggle("chosen", one.textContent.toLowerCase() === turn.vote));
  if (shown?.turn === turn) show(turn, false);
  log.scrollTop = log.scrollHeight;
}
function words(turn) {  // the text, with the words of each place in its color
  const letters = Array.from(turn.answer), owner = letters.map(() => null);
  turn.places.forEach((one, k) => {
    if (one.phrase) for (let i = one.phrase[0]; i < one.phrase[1]; i++) owner[i] ??= {k, digits: false};
    for (let i = one.start ?? 0; i < (one.end ?? 0); i++) owner[i] = {k, digits: true};
  });
  const made = [];
  for (let i = 0; i < letters.length;) {
    let end = i + 1;
    while (end < letters.length && owner[end]?.k === owner[i]?.k && owner[end]?.digits === owner[i]?.digits) end++;
    const text = letters.slice(i, end).join("");
    if (!owner[i]) made.push(text);
    else {
      const {k, digits} = owner[i];
      const word = element("span", {className: `word place-${k}${digits ? " digits" : ""}`, textContent: text, onmouseenter: () => light(turn, k), onmouseleave: () => light(turn, null)});
      word.style.borderColor = PALETTE[k % PALETTE.length];
      made.push(word);
    }
    i = end;
  }
  return made;
}
function show(turn, redraw = true) {  // the places of one answer over the image
  document.querySelectorAll(".turn.shown").forEach(one => one.classList.remove("shown"));
  shown = turn ? {turn, places: turn.places.map((one, k) => ({shape: placeShape(turn, one, k)}))} : null;
  turn?.row.classList.add("shown");
  if (redraw || turn) showRegions();
}
function placeShape(turn, one, k) {
  const color = PALETTE[k % PALETTE.length], group = shape("g", {class: `place place-${k}`});
  if (one.mask) group.append(shape("image", {href: maskUrl(one.mask, color), width: 1, height: 1, preserveAspectRatio: "none"}));
  if (one.box) {
    const [x, y, u, v] = one.box;
    group.append(shape("rect", {x, y, width: u - x, height: v - y, stroke: color}));
  }
  group.addEventListener("mouseenter", () => light(turn, k));
  group.addEventListener("mouseleave", () => light(turn, null));
  if (turn.lit !== undefined && turn.lit !== null) group.classList.add(turn.lit === k ? "lit" : "dim");
  return group;
}
function light(turn, k) {
  turn.lit = k;
  if (shown?.turn !== turn) { if (k !== null && talk.turns.includes(turn)) show(turn); }
  shown?.places.forEach((one, j) => {
    one.shape.classList.toggle("lit", k === j);
    one.shape.classList.toggle("dim", k !== null && k !== j);
  });
  turn.row.querySelectorAll(".word").forEach(word => word.classList.toggle("lit", k !== null && word.classList.contains(`place-${k}`)));
}
function maskUrl(mask, color) {  // COCO's compressed run lengths, column by column
  const [height, width] = mask.size, counts = [], canvas = element("canvas", {width, height});
  for (let place = 0; place < mask.counts.length;) {
    let value = 0, shift = 0, more = true;
    while (more) {
      const code = mask.counts.charCodeAt(place++) - 48;
      value |= (code & 31) << shift;
      shift += 5;
      more = Boolean(code & 32);
      if (!more && code & 16) value |= -1 << shift;
    }
    counts.push(counts.length > 2 ? value + counts.at(-2) : value);
  }
  const context = canvas.getContext("2d"), pixels = context.createImageData(width, height);
  const rgb = [1, 3, 5].map(start => parseInt(color.slice(start, start + 2), 16));
  let index = 0, inside = false;
  for (const count of counts) {
    for (let end = index + count; index < end; index++)
      if (inside) pixels.data.set([...rgb, 115], 4 * ((index % height) * width + Math.floor(index / height)));
    inside = !inside;
  }
  context.putImageData(pixels, 0, 0);
  return canvas.toDataURL();
}
function save() {
  const rows = talks.flatMap((one, number) => [...one.replaced, ...one.turns].filter(turn => turn.answer).map(turn => JSON.stringify({
    talk: number, replaced: one.replaced.includes(turn), model: settings.name, image: one.picture?.name ?? null, question: turn.question, question_regions: turn.regions,
    answer: turn.answer, regions: turn.places, vote: turn.vote, ...turn.settings,
  })));
  if (!rows.length) return warn("There is no answer to save yet.");
  const blob = new Blob([rows.join("\n") + "\n"], {type: "application/jsonl"});
  const link = element("a", {href: URL.createObjectURL(blob), download: "talks.jsonl"});
  link.click();
  URL.revokeObjectURL(link.href);
}

// ------------------------------------------------------------------ start

async function openExample(example) {
  const reply = await fetch(example.image);
  if (!reply.ok) return warn("This example's image is gone.");
  const blob = await reply.blob();
  if (await openFile(new File([blob], example.image.split("/").at(-1), {type: blob.type}))) question.value = example.question;
}
async function begin() {
  settings = await (await fetch("/page.json")).json();
  document.title = at("name").textContent = settings.name;
  for (const [id, value] of [["temperature", settings.temperature], ["length", settings.max_tokens]]) {
    if (id === "length") at(id).max = value;
    at(id).value = value;
    at(id).oninput = () => { at(id).nextElementSibling.value = at(id).value; };
    at(id).oninput();
  }
  at("remembers").checked = settings.remembers;
  at("tag-row").hidden = !settings.uses_tags;
  at("key-row").hidden = !settings.has_key;
  if (settings.has_key) at("settings").open = true;
  at("picture").hidden = !settings.reads_images;
  at("modes").hidden = !settings.reads_boxes;
  if (!settings.reads_boxes) at("hint").textContent = "This model reads no regions; say in words what is meant.";
  at("examples").append(...settings.examples.map(one => element("button", {type: "button", onclick: () => openExample(one)},
    element("img", {src: one.image, alt: ""}), element("span", {textContent: one.question}))));
}
at("file").onchange = event => openFile(event.target.files[0]).then(() => { event.target.value = ""; });
at("ask").onsubmit = event => { event.preventDefault(); if (!running) ask(question.value, [...regions]); };
at("stop").onclick = stop;
at("retry").onclick = () => {
  const last = talk.turns.at(-1);
  editing = talk.turns.length - 1;
  ask(last.question, last.regions);
};
at("new").onclick = () => { stop(); beginTalk(); setRunning(false); };
at("save").onclick = save;
question.onkeydown = event => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) { event.preventDefault(); at("ask").requestSubmit(); }
};
document.querySelectorAll("[name=mode]").forEach(one => {
  one.onchange = () => {
    corner = null;
    at("hint").textContent = one.value === "point" ? "Click what you ask about." : "Drag, or click two corners, to ask about a box.";
    showRegions();
  };
});
document.onkeydown = event => { if (event.key === "Escape" && corner) { corner = null; showRegions(); } };
document.onpaste = event => { const file = [...event.clipboardData.files][0]; if (file) { event.preventDefault(); openFile(file); } };
document.ondragover = event => event.preventDefault();
document.ondrop = event => { event.preventDefault(); openFile(event.dataTransfer.files[0]); };
overlay.onpointerdown = onDown;
new ResizeObserver(() => showRegions()).observe(at("stage"));
begin().catch(() => warn("The server does not answer; load the page again."));
