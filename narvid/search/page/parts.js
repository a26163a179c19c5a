// What stands on the page: cards, an open answer, words. Nothing here asks the server but for pictures and clips.
"use strict";
const byId = (id) => document.getElementById(id);

// Text enters the page here alone, as text.
function make(tag, className, text, ...children) {
  const element = document.createElement(tag);
  if (className) element.className = className;
  if (text !== undefined && text !== null) element.textContent = text;
  element.append(...children.filter((child) => child !== null && child !== undefined));
  return element;
}

function makeButton(text, act, className) {
  const button = make("button", className, text);
  button.type = "button";
  button.addEventListener("click", act);
  return button;
}

const plural = (n, one, many) => n.toLocaleString("en") + " " + (n === 1 ? one : many || one + "s");
const weight = (x) => (x >= 0.995 ? "1" : x.toFixed(2));
const day = (seconds) => new Date(1000 * seconds).toLocaleDateString("en", { year: "numeric", month: "short", day: "numeric" });

function clock(seconds) {
  const s = Math.floor(seconds + 1e-6);
  const tail = String(s % 60).padStart(2, "0");
  return s < 3600 ? Math.floor(s / 60) + ":" + tail
    : Math.floor(s / 3600) + ":" + String(Math.floor(s / 60) % 60).padStart(2, "0") + ":" + tail;
}

function span(seconds) {
  if (seconds < 90) return plural(Math.round(seconds), "second");
  return seconds < 5400 ? plural(Math.round(seconds / 60), "minute") : (seconds / 3600).toFixed(1) + " hours";
}

// A name may hold marks that turn the text behind them around: they are written out.
function visible(name) {
  return name.replace(/[\p{Cc}\u200e\u200f\u202a-\u202e\u2066-\u2069]/gu,
    (c) => "\\u" + c.codePointAt(0).toString(16).padStart(4, "0"));
}

const fileOf = (path) => path.slice(path.lastIndexOf("/") + 1);

function makePicture(file, number) {
  const image = make("img");
  image.loading = "lazy";
  image.decoding = "async";
  image.alt = "";
  image.src = "/frame/" + file + "/" + number;
  return image;
}

// ---- a card: its picture moves through the window's frames while it is pointed at ----

function makeThumb(file, numbers, first, ...tags) {
  const image = makePicture(file, first);
  const beat = make("i", "beat");
  const thumb = make("span", "thumb", null, image, beat, ...tags);
  let timer = null;
  thumb.move = () => {
    if (timer || numbers.length < 2 || matchMedia("(prefers-reduced-motion: reduce)").matches) return;
    let at = Math.max(0, numbers.indexOf(first));
    timer = setInterval(() => {
      at = (at + 1) % numbers.length;
      image.src = "/frame/" + file + "/" + numbers[at];
      beat.style.width = 100 * (at + 1) / numbers.length + "%";
    }, 350);
  };
  thumb.rest = () => {
    clearInterval(timer);
    timer = null;
    image.src = "/frame/" + file + "/" + first;
    beat.style.width = 0;
  };
  return thumb;
}

function moveWhenPointedAt(button, thumb) {
  button.addEventListener("mouseenter", thumb.move);
  button.addEventListener("mouseleave", thumb.rest);
  button.addEventListener("focus", () => { if (button.matches(":focus-visible")) thumb.move(); });
  button.addEventListener("blur", thumb.rest);
}

function makeWords(words) {
  const at = words.indexOf(": ");
  return at < 0 ? make("span", "words", null, make("b", "number", words))
    : make("span", "words", null, make("b", "number", words.slice(0, at)), " " + words.slice(at + 2));
}

function makeSaid(said) {
  return said && make("span", "spoken", null, make("b", "number", clock(said.start) + " said:"), " “" + said.text + "”");
}

function makeCard(answer, open) {
  const tag = make("span", "tag number", clock(answer.seconds));
  const more = answer.more ? make("span", "tag more", plural(answer.more, "more moment")) : null;
  const thumb = makeThumb(answer.file, answer.frames.map((frame) => frame.number),
    answer.best === null ? 0 : answer.best, tag, more);
  const name = make("span", "name", fileOf(answer.path));
  name.title = answer.path;
  const button = makeButton(null, open);
  button.append(thumb, make("span", "text", null, makeWords(answer.words), makeSaid(answer.said), name));
  moveWhenPointedAt(button, thumb);
  return make("li", "card", null, button);
}

function makeWallCard(window_, like) {
  const thumb = makeThumb(window_.file, window_.frames, window_.frames[Math.floor(window_.frames.length / 2)]);
  const button = makeButton(null, like);
  button.append(thumb, make("span", "unseen", "More like " + fileOf(window_.path) + ", " + clock(window_.start)));
  moveWhenPointedAt(button, thumb);
  return make("li", "card", null, button);
}

// ---- a picture, a clip or a window of the query, beside its words ----

const PART = /([+-])\s*(?:([0-9.]+)\*)?(picture|clip|window):(\w+)/g;
const readParts = (text) => [...text.matchAll(PART)].map(([, sign, by, kind, value]) => ({ sign, by: Number(by || 1), kind, value }));
const writeParts = (parts) => parts.map((part) => part.sign + " " + (part.by === 1 ? "" : part.by + "*") + part.kind + ":"
  + part.value).join(" ");

// named: what the server said of it, where it has answered; change: called with what shall stand in its place, or null.
function makePart(part, named, change) {
  const image = part.kind !== "window" ? make("img") : named ? makePicture(named.file, named.frame) : null;
  const name = part.kind === "window" ? named ? fileOf(named.path) + " " + clock(named.start) : "moment" : part.kind;
  if (part.kind !== "window") {
    image.alt = "";
    image.src = "/picture/" + part.value;
  }
  const sign = makeButton(part.sign === "+" ? "+" : "−", () => change({ ...part, sign: part.sign === "+" ? "-" : "+" }));
  sign.setAttribute("aria-label", (part.sign === "+" ? "like" : "unlike") + " this " + part.kind + "; turn around");
  const by = make("select");
  by.setAttribute("aria-label", "how much this " + part.kind + " counts");
  for (const value of [...new Set([0.25, 0.5, 1, 2, 4, part.by])].sort((a, b) => a - b)) by.add(new Option("× " + value, value));
  by.value = part.by;
  by.addEventListener("change", () => change({ ...part, by: Number(by.value) }));
  const drop = makeButton("✕", () => change(null), "plain");
  drop.setAttribute("aria-label", "take this " + part.kind + " out of the query");
  return make("li", "", null, sign, by, image, make("span", "", name), drop);
}

// The parts of a query in words, as the server says them.
function inWords(parts) {
  return parts.map((part, n) => (part.weight < 0 ? "− " : n ? "+ " : "") + (Math.abs(part.weight) === 1 ? "" :
    Math.abs(part.weight) + " × ") + (part.kind === "text" ? "“" + part.value + "”" : part.kind === "window"
    ? visible(fileOf(part.path)) + " " + clock(part.start) : "your " + part.kind)).join(" ");
}

// ---- an open answer ----

function makeScreen(answer) {
  const video = make("video");
  Object.assign(video, { controls: true, playsInline: true, preload: "auto" });
  if (answer.best !== null) video.poster = "/frame/" + answer.file + "/" + answer.best;
  video.setAttribute("aria-label", answer.path + " from " + clock(answer.moment));
  const label = make("span", "label", "preview");
  label.title = "Browsers do not play this file; this stretch of it is made for watching.";
  const loading = make("span", "label", "loading …");
  const problem = make("p", "problem");
  label.hidden = problem.hidden = true;
  let now = null; // the stretch that plays: { src, begins, ends, preview }
  let asked = null;
  const fail = (text) => {
    loading.hidden = true;
    problem.hidden = false;
    problem.textContent = "This clip cannot be shown: " + text;
  };
  video.jump = async (time) => {
    if (now && time >= now.begins && (!now.preview || seekable(time - now.begins))) {
      video.currentTime = time - now.begins;
      video.play().catch(() => {});
      return;
    }
    if (asked) asked.abort();
    asked = new AbortController();
    loading.hidden = false;
    try {
      const end = Math.max(time + 30, answer.end);
      const response = await fetch("/api/clip?" + new URLSearchParams({ file: answer.file, start: time, end }),
        { signal: asked.signal });
      const found = await response.json();
      if (!response.ok) { fail(found.error); return; }
      now = found;
      label.hidden = !found.preview;
      if (found.preview) label.textContent = found.sound ? "preview" : "preview, without sound";
      video.src = found.src;
      video.addEventListener("loadedmetadata", () => {
        if (time - found.begins > 0.05) video.currentTime = time - found.begins;
      }, { once: true });
      video.play().catch(() => {}); // refused or broken: the error event says so
    } catch (error) {
      if (error.name !== "AbortError") fail("the server does not answer.");
    }
  };
  const seekable = (at) => [...Array(video.buffered.length).keys()].some(
    (i) => video.buffered.start(i) <= at && at < video.buffered.end(i));
  video.leave = () => { // what is still being made for it ends
    if (asked) asked.abort();
    now = null;
    video.pause();
    video.removeAttribute("src");
    video.load();
  };
  video.addEventListener("loadeddata", () => { loading.hidden = true; });
  video.addEventListener("ended", () => {
    if (now && now.preview && now.ends < answer.seconds - 0.5) video.jump(now.ends);
  });
  video.addEventListener("error", () => { if (now) fail("this browser does not play it."); });
  const place = make("div", "place", null, make("i"));
  place.firstChild.style.left = 100 * answer.start / answer.seconds + "%";
  place.firstChild.style.width = 100 * (answer.end - answer.start) / answer.seconds + "%";
  place.title = clock(answer.start) + " to " + clock(answer.end) + " of " + clock(answer.seconds);
  place.hidden = answer.end - answer.start > 0.9 * answer.seconds;
  return [make("figure", "", null, make("div", "screen", null, video, label, loading), place, problem), video];
}

function makeStrip(answer, video) {
  const strip = make("ol", "strip both");
  strip.setAttribute("aria-label", "frames in order, with their weights");
  const longest = Math.max(...answer.frames.map((frame) => frame.frame_weight)) || 1;
  for (const frame of answer.frames) {
    const bar = make("i");
    bar.style.height = 100 * frame.frame_weight / longest + "%";
    bar.hidden = !frame.frame_weight;
    const kept = frame.frame_weight > 0 ? "weight " + weight(frame.frame_weight) : "dropped by the filter";
    const button = makeButton(null, () => video.jump(frame.time), frame.frame_weight > 0 ? "" : "dropped");
    button.append(makePicture(answer.file, frame.number), make("span", "gauge", null, bar),
      make("span", "time number", clock(frame.time)));
    button.title = clock(frame.time) + ", " + kept + (frame.sentence === null ? "" : ": " + frame.sentence);
    button.setAttribute("aria-label", "play from " + clock(frame.time) + ", frame " + kept);
    strip.append(make("li", "", null, button));
  }
  return strip;
}

function makeSentences(answer) {
  const list = make("ol", "sentences");
  list.setAttribute("aria-label", "sentences");
  const longest = Math.max(...answer.frames.map((frame) => frame.sentence_weight)) || 1;
  for (const frame of answer.frames) {
    const bar = make("span", "weight", null, make("i"));
    bar.firstChild.style.width = 100 * frame.sentence_weight / longest + "%";
    bar.firstChild.hidden = !frame.sentence_weight;
    const kept = frame.sentence_weight > 0;
    const text = make("span", "line_text", frame.sentence === null ? "no sentence for this frame" : frame.sentence);
    if (frame.sentence !== null) {
      text.prepend(make("span", "unseen", kept ? "kept, weight " + weight(frame.sentence_weight) + ": " : "dropped: "));
    }
    list.append(make("li", (kept ? "" : "dropped") + (frame.sentence === null ? " none" : ""), null,
      make("span", "time number", clock(frame.time)), bar, text));
  }
  return list;
}

function makeScores(answer) {
  const list = make("dl", "scores number");
  const add = (name, below, value, digits, title) => {
    if (value === null) return;
    const row = make("div", "", null, make("dt", "", name, below && make("sub", "", below)),
      make("dd", "", value.toFixed(digits)));
    row.title = title;
    list.append(row);
  };
  add("score", null, answer.score, 2, "the views, standardised and added (Eq. 11); answers are sorted by it");
  add("S", "qv", answer.s_video, 3, "query and frames: what is seen");
  add("S", "qn", answer.s_narration, 3, "query and narration: what its sentences say");
  add("speech", null, answer.speech, 2, "query and what is said: what of the score is for it");
  return list;
}

function makeWhy(answer, detail) {
  const why = make("details", "why both", null, make("summary", "", "Why this answer"), makeScores(answer),
    make("p", "", answer.why));
  if (answer.frames.some((frame) => frame.sentence !== null)) {
    why.append(makeSentences(answer));
    const dropped = answer.frames.filter((frame) => !frame.sentence_weight).length;
    const all = makeButton("All sentences (" + answer.frames.length + ")",
      () => all.setAttribute("aria-pressed", detail.classList.toggle("all")));
    all.setAttribute("aria-pressed", "false");
    all.hidden = !dropped;
    why.append(make("div", "acts", null, all));
  }
  why.append(make("p", "", "Grey frames are dropped for this query; bars are weights."));
  return why;
}

function makeMoments(answer, video) {
  if (!answer.moments.length) return null;
  const row = make("div", "moments");
  for (const moment of answer.moments) {
    const button = makeButton(null, () => video.jump(moment.start));
    button.append(makePicture(answer.file, moment.frame), make("span", "number", clock(moment.start)));
    button.setAttribute("aria-label", "play from " + clock(moment.start));
    row.append(button);
  }
  const more = answer.more > answer.moments.length ? ", the best " + answer.moments.length : "";
  return make("div", "both", null, make("h3", "", plural(answer.more, "more moment") + " in this file" + more), row);
}

// acts: { like, combine, choose, isChosen, say }
function makeDetail(answer, acts, local) {
  const detail = make("div", "detail");
  const [figure, video] = makeScreen(answer);
  const like = makeButton("More like this", acts.like);
  like.title = "Windows whose frames" + (answer.s_narration === null ? "" : " and sentences") + " resemble this one's";
  const combine = makeButton("Add to query", acts.combine);
  combine.title = "Look for what you wrote and for moments like this one, together";
  const choose = makeButton("Choose", () => choose.setAttribute("aria-pressed", acts.choose()));
  choose.setAttribute("aria-pressed", acts.isChosen());
  choose.title = "Collect moments for an EDL or CSV";
  const save = make("a", "button", "Download");
  save.href = "/cut/" + answer.file + "?" + new URLSearchParams({ start: answer.start, end: answer.end });
  save.download = "";
  save.title = clock(answer.start) + " to " + clock(answer.end) + " as an mp4";
  const row = make("p", "acts", null, like, combine, choose, save);
  if (local) {
    row.append(makeButton("Copy path", async () => {
      const answer_ = await (await fetch("/api/path?file=" + answer.file)).json();
      try {
        await navigator.clipboard.writeText(answer_.path);
        acts.say("Path copied.");
      } catch {
        acts.say(answer_.path || answer_.error);
      }
    }), makeButton("Show in folder", async () => {
      const response = await fetch("/api/reveal?file=" + answer.file, { method: "POST" });
      if (!response.ok) acts.say((await response.json()).error);
    }));
  }
  const at = answer.path.lastIndexOf("/") + 1;
  const date = (answer.recorded ? "recorded " : "file of ") + day(answer.date);
  const said = make("p", "soft");
  said.setAttribute("role", "status");
  detail.said = said;
  const heard = makeSaid(answer.said);
  const play = heard && makeButton(null, () => video.jump(answer.said.start), "plain");
  if (play) play.append(heard);
  detail.append(figure, make("div", "", null, make("p", "said", answer.words), play,
    make("p", "where", null, make("span", "", answer.path.slice(0, at)), make("b", "", answer.path.slice(at))),
    make("p", "where number", clock(answer.start) + "–" + clock(answer.end) + " of " + clock(answer.seconds) + ", " + date),
    row, said));
  detail.append(makeStrip(answer, video), makeMoments(answer, video) || "", makeWhy(answer, detail));
  detail.video = video;
  detail.like = like;
  detail.choose = choose;
  return detail;
}

// ---- chosen moments as files ----

function asCsv(chosen) {
  const cell = (value) => (/[",\r\n]|^[=+\-@\t]/.test(value) ? '"' + (/^[=+\-@\t]/.test(value) ? "'" : "")
    + value.replaceAll('"', '""') + '"' : value);
  const rows = chosen.map((c) => [c.path, c.start.toFixed(3), c.end.toFixed(3), c.words].map(cell).join(","));
  return ["file,start,end,words", ...rows].join("\r\n") + "\r\n";
}

function timecode(seconds, rate = 25) {
  const frames = Math.round(seconds * rate);
  const two = (n) => String(n).padStart(2, "0");
  const s = Math.floor(frames / rate);
  return [two(Math.floor(s / 3600)), two(Math.floor(s / 60) % 60), two(s % 60), two(frames % rate)].join(":");
}

function asEdl(chosen) { // CMX 3600, 25 frames a second
  const lines = ["TITLE: NarVid search", "FCM: NON-DROP FRAME", ""];
  let at = 0;
  chosen.forEach((c, n) => {
    const length = c.end - c.start;
    lines.push(String(n + 1).padStart(3, "0") + "  AX       V     C        " + [c.start, c.end, at, at + length].map(
      (t) => timecode(t)).join(" "));
    lines.push("* FROM CLIP NAME: " + fileOf(c.path), "* SOURCE FILE: " + c.path, "* COMMENT: " + c.words.replace(/\s+/g, " "), "");
    at += length;
  });
  return lines.join("\r\n");
}
