// What the page asks for, and when: addresses, filters, endless scrolling, pictures, what was searched before.
"use strict";
const AT_ONCE = 24; // answers that are asked for at a time
const seen = new Map(); // address -> { head, answers, scroll }: going back shows what was there, at once
let shown = location.search; // the address whose answers stand on the page
let result = null; // { head, answers } of it
let asked = null; // the request under way
let index = null; // what /api/about said
let opened = -1; // the answer that is open
const local = ["127.0.0.1", "localhost", "[::1]"].includes(location.hostname);

const kept = {
  read: (name) => { try { return JSON.parse(localStorage.getItem(name)) || []; } catch { return []; } },
  write: (name, value) => { try { localStorage.setItem(name, JSON.stringify(value)); } catch { /* a private window */ } },
};

// ---- asking ----

const rangeOf = (length) => length.split("-"); // "60-300" -> at least, at most; either may be empty
const midnight = (date, days) => (date ? String(new Date(date + "T00:00:00").getTime() / 1000 + 86400 * days) : "");

function filterValues() {
  const [least, most] = rangeOf(byId("length").value || "-");
  return { folder: byId("folder").value, min_seconds: least, max_seconds: most, since: midnight(byId("since").value, 0),
    until: midnight(byId("until").value, 1), moments: byId("moments").checked ? "1" : "",
    has_speech: byId("has_speech").checked ? "1" : "" };
}

function addressOf(changes) {
  const values = new URLSearchParams();
  for (const [name, value] of Object.entries({ ...filterValues(), ...changes })) {
    if (value !== "" && value !== null) values.set(name, value);
  }
  return "?" + values;
}

// Show what a new address asks for; the back button returns to this one.
function go(changes) {
  remember();
  closeAnswer();
  const address = addressOf(changes);
  if (address !== location.search) history.pushState(null, "", address);
  show();
}

// What the address asks for beside words: pictures, clips, windows; an address of before has one picture alone.
function partsOf(values = new URLSearchParams(shown)) {
  if (values.get("like")) return [{ sign: "+", by: 1, kind: "window", value: values.get("like") }];
  return readParts(values.get("parts") || (values.get("picture") ? "+ picture:" + values.get("picture") : ""));
}

const wordsOf = () => byId("q").value.trim();

function goParts(q, parts) {
  const [only] = parts;
  if (!q && !parts.length) go({});
  else if (!q && parts.length === 1 && only.kind === "picture" && only.sign === "+") go({ picture: only.value });
  else go({ q, parts: writeParts(parts) });
}

function remember() {
  if (seen.has(shown)) seen.get(shown).scroll = scrollY;
}

async function request(address, skip, signal) {
  const values = new URLSearchParams(address);
  const known = ["q", "parts", "like", "picture", "folder", "min_seconds", "max_seconds", "since", "until", "moments",
    "has_speech"];
  for (const name of [...values.keys()]) if (!known.includes(name)) values.delete(name);
  let path = "/api/search?";
  if (values.has("like")) {
    path = "/api/like?";
    values.set("window", values.get("like"));
    for (const name of ["q", "parts", "picture"]) values.delete(name);
  } else if (values.has("picture")) {
    path = "/api/picture?";
    for (const name of ["q", "parts"]) values.delete(name);
  }
  values.delete("like");
  values.set("top", AT_ONCE);
  values.set("skip", skip);
  return fetched(path + values, { signal });
}

async function fetched(path, options) {
  let response;
  try {
    response = await fetch(path, options);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Error("The server does not answer; is it still running?");
  }
  if (response.status === 401) { location.href = "/login"; throw new Error("The password is asked for again."); }
  const body = await response.json();
  if (!response.ok) throw new Error(body.error);
  return body;
}

async function show() {
  const address = location.search;
  shown = address;
  if (asked) asked.abort();
  fillForm(new URLSearchParams(address));
  if (!/[?&](q|parts|like|picture)=./.test(address)) { busy(false); result = null; showStart(); return; }
  const known = seen.get(address);
  if (known) { busy(false); showResult(known); scrollTo(0, known.scroll); return; }
  const mine = asked = new AbortController();
  busy(true);
  try {
    const { answers, ...head } = await request(address, 0, mine.signal);
    seen.set(address, { head, answers, scroll: 0 });
    if (head.query !== undefined && !/[?&]parts=./.test(address)) noteQuery(head.query);
    showResult(seen.get(address));
    scrollTo(0, 0);
    setTimeout(moreIfNear, 50);
  } catch (error) {
    if (error.name === "AbortError") return; // a later question has taken its place
    clear();
    say([error.message], "wrong");
  }
  if (asked === mine) busy(false);
}

// The next ones come below those that stand there.
async function showMore() {
  if (!result || document.body.classList.contains("asking") || byId("more").hidden) return;
  const to = result, mine = asked = new AbortController();
  busy(true);
  try {
    const { answers } = await request(shown, to.answers.length, mine.signal);
    to.answers.push(...answers);
    if (!answers.length) to.head.total = to.answers.length;
    if (to === result) append(answers);
  } catch (error) {
    if (error.name !== "AbortError") say([error.message], "wrong");
  }
  if (asked === mine) busy(false);
  moreIfNear();
}

function moreIfNear() {
  if (!byId("more").hidden && byId("more").getBoundingClientRect().top < innerHeight + 600) setTimeout(showMore, 50);
}

function busy(is) {
  byId("busy").hidden = !is;
  document.body.classList.toggle("asking", is);
  byId("answers").setAttribute("aria-busy", is);
}

// ---- the form ----

function fillForm(values) {
  if (byId("q").value.trim() !== (values.get("q") || "")) byId("q").value = values.get("q") || "";
  showParts(values.get("like") ? [] : partsOf(values));
  choose(byId("folder"), values.get("folder") || "");
  const length = (values.get("min_seconds") || "") + "-" + (values.get("max_seconds") || "");
  choose(byId("length"), length === "-" ? "" : length);
  const date = (seconds, days) => {
    const d = new Date(1000 * (seconds - 86400 * days));
    return [d.getFullYear(), String(d.getMonth() + 1).padStart(2, "0"), String(d.getDate()).padStart(2, "0")].join("-");
  };
  byId("since").value = values.get("since") ? date(values.get("since"), 0) : "";
  byId("until").value = values.get("until") ? date(values.get("until"), 1) : "";
  byId("moments").checked = values.get("moments") === "1";
  byId("has_speech").checked = values.get("has_speech") === "1";
  if (byId("has_speech").checked) byId("speaks").hidden = false;
  const narrowed = Object.values(filterValues()).filter(Boolean).length;
  byId("clear").hidden = !narrowed;
  byId("more_filters").textContent = narrowed ? "Filters (" + narrowed + ")" : "Filters";
}

// named: what the server said of each, once it has answered.
function showParts(parts, named) {
  byId("parts").hidden = !parts.length;
  byId("parts").replaceChildren(...parts.map((part, n) => makePart(part, named && named[n], (changed) => {
    goParts(wordsOf(), parts.map((other, m) => (m === n ? changed : other)).filter(Boolean));
  })));
}

// A value that a shared link brings along and the list lacks is added to it.
function choose(select, value) {
  if (![...select.options].some((option) => option.value === value)) {
    const [least, most] = rangeOf(value);
    const text = select.id === "folder" ? value : (least || 0) + " to " + (most || "any number of") + " seconds";
    select.add(new Option(text, value));
  }
  select.value = value;
}

function showHistory() { // offered while one writes
  byId("history").replaceChildren(...kept.read("narvid_queries").map((q) => new Option(q, q)));
}

function noteQuery(query) {
  kept.write("narvid_queries", [query, ...kept.read("narvid_queries").filter((q) => q !== query)].slice(0, 100));
  showHistory();
}

// ---- what stands on the page ----

function say(parts, how) {
  byId("status").className = how || "";
  byId("status").replaceChildren(...parts);
}

function clear() {
  byId("answers").replaceChildren();
  byId("start").hidden = byId("more").hidden = byId("source").hidden = true;
  say([]);
}

function showStart() {
  clear();
  document.title = "NarVid search";
  if (index === null) return;
  byId("start").hidden = false;
  if (index.windows === 0) {
    byId("title").textContent = "Nothing is indexed yet.";
    byId("advice").replaceChildren("Fill the index, then load this page again: ",
      make("code", "", "narvid-search index VIDEOS --out INDEX"));
    return;
  }
  byId("title").textContent = plural(index.files, "video") + ", " + span(index.seconds);
  byId("advice").textContent = "Say what happens, as a sentence: who does what, and where. Or drop a picture on this page.";
  chips("recent", kept.read("narvid_queries").slice(0, 8), true);
  chips("examples", index.examples, false);
  if (!byId("wall").childElementCount) {
    fetched("/api/wall", {}).then(({ windows }) => {
      byId("wall_title").hidden = !windows.length;
      byId("wall").replaceChildren(...windows.map((w) => makeWallCard({ ...w, path: visible(w.path) },
        () => go({ like: w.window }))));
    }).catch(() => {});
  }
}

function chips(id, queries, forgettable) {
  const list = byId(id).lastElementChild;
  byId(id).hidden = !queries.length;
  list.replaceChildren(...queries.map((q) => make("li", "", null, makeButton(q, () => go({ q })))));
  if (forgettable) {
    list.append(make("li", "", null, makeButton("Forget these", () => {
      kept.write("narvid_queries", []);
      showHistory();
      showStart();
    },
      "plain")));
  }
}

function showResult(known) {
  clear();
  result = known;
  const { head, answers } = known;
  const what = head.parts ? inWords(head.parts) : head.query !== undefined ? "“" + head.query + "”" : head.like
    ? visible(head.like.path) + ", " + clock(head.like.start) + "–" + clock(head.like.end) : "your picture";
  if (head.parts) showParts(partsOf(), head.parts.filter((part) => part.kind !== "text"));
  document.title = what + " · NarVid search";
  showSource(head, answers);
  if (!answers.length) {
    const set = [byId("folder").value && "in this folder", byId("length").value && "of this length",
      (byId("since").value || byId("until").value) && "of these days",
      byId("has_speech").checked && "in which something is said"].filter(Boolean);
    say(["No answer" + (set.length ? " " + set.join(" and ") + "; widen the filters." : "; the index is empty.")]);
    return;
  }
  const name = byId("moments").checked ? "moment" : "video";
  if (head.fits === false) {
    say([make("strong", "", "Nothing here fits well."), " These come nearest to ", make("strong", "", what), "."], "poor");
  } else {
    say([(head.query !== undefined ? "For " : "Like "), make("strong", "", what), ": ",
      plural(head.total, name) + " in order, the best first, " + head.took.toFixed(2) + " s"]);
  }
  append(answers);
}

function append(answers) {
  const list = byId("answers"), first = list.childElementCount;
  for (const answer of answers) answer.path = visible(answer.path);
  list.append(...answers.map((answer, n) => makeCard(answer, () => openAnswer(first + n))));
  for (const [n, card] of [...list.children].entries()) card.firstChild.tabIndex = n ? -1 : 0;
  byId("more").hidden = result.answers.length >= result.head.total;
}

// What "more like this" and a search by a picture look for.
function showSource(head) {
  const source = byId("source");
  source.hidden = head.query !== undefined;
  if (head.like) {
    const some = head.like.frames.filter((_, n, all) => n % Math.ceil(all.length / 6) === 0);
    const sentences = index && index.narrated ? " and whose sentences say alike" : "";
    source.replaceChildren(...some.map((number) => makePicture(head.like.file, number)),
      make("p", "soft", "Moments that look like these frames" + sentences + ". Words were not searched for."));
  } else if (head.picture) {
    const image = make("img");
    image.alt = "the picture";
    image.src = "/picture/" + head.picture;
    source.replaceChildren(image, make("p", "soft", "Moments with a frame that looks like this picture. Sentences play no part."));
  }
}

function showAbout() {
  byId("about").textContent = plural(index.files, "video") + " in " + index.videos + ", " + plural(index.windows, "window")
    + ", " + span(index.seconds) + "; " + index.method + ", " + (index.narrated ? "frames and narration" : "frames alone")
    + ". A search asks no other machine than the one that serves this page.";
  byId("notice").hidden = index.narrated || !index.windows;
  byId("notice").textContent = index.loses || "";
  byId("folders").hidden = !index.folders.length;
  const chosen = byId("folder").value;
  byId("folder").replaceChildren(new Option("all", ""), ...index.folders.map((folder) => new Option(folder, folder)));
  choose(byId("folder"), chosen);
  byId("speaks").hidden = !index.spoken && !byId("has_speech").checked;
  listFiles("failed", index.failures, "could not be read", index.failed);
  listFiles("unheard", index.unheard.length, index.unheard.length === 1 ? "has subtitles that are amiss"
    : "have subtitles that are amiss", index.unheard);
}

function listFiles(id, count, what, files) {
  byId(id).hidden = !count;
  byId(id).firstElementChild.textContent = plural(count, "file") + " " + what;
  byId(id).lastElementChild.replaceChildren(...files.map((file) => make("li", "", visible(file.path + ": " + file.why))),
    ...(count > files.length ? [make("li", "", "…")] : []));
}

// ---- pictures and clips, and the rest, once ----

async function sendPart(file) {
  if (!file) return;
  closeAnswer();
  if (asked) asked.abort();
  const mine = asked = new AbortController();
  busy(true);
  try { // the server keeps it, so that it can be asked for by its name, also after a reload
    const kind = file.type.startsWith("video/") || /\.(mkv|mts|m2ts|ts|flv|avi|vob)$/i.test(file.name) ? "clip" : "picture";
    const found = await fetched(kind === "clip" ? "/api/query_clip?top=1" : "/api/picture?top=1",
      { method: "POST", body: file, signal: mine.signal });
    const others = /[?&]like=./.test(shown) ? [] : partsOf();
    goParts(wordsOf(), [...others, { sign: "+", by: 1, kind, value: found[kind] }]);
  } catch (error) {
    if (error.name === "AbortError") return;
    clear();
    say([error.message], "wrong");
    busy(false);
  }
}

const again = () => { // of a filter: the same question again, with it
  const values = new URLSearchParams(location.search);
  const [name] = ["like", "picture", "q"].filter((key) => values.get(key));
  if (name) go({ [name]: values.get(name), ...(name === "q" && values.get("parts") ? { parts: values.get("parts") } : {}) });
  else if (values.get("parts")) go({ parts: values.get("parts") });
  else fillForm(new URLSearchParams(addressOf({})));
};
byId("form").addEventListener("submit", (event) => {
  event.preventDefault();
  const query = byId("q").value.trim();
  const parts = /[?&]like=./.test(shown) ? [] : partsOf();
  if (!query && !parts.length) { byId("q").focus(); return; }
  if (matchMedia("(pointer: coarse)").matches) byId("q").blur(); // the phone's keyboard makes room
  seen.delete(addressOf({ q: query, parts: writeParts(parts) }));
  goParts(query, parts);
});
for (const id of ["folder", "length", "since", "until", "moments", "has_speech"]) byId(id).addEventListener("change", again);
byId("clear").addEventListener("click", () => {
  for (const id of ["folder", "length", "since", "until"]) byId(id).value = "";
  byId("moments").checked = byId("has_speech").checked = false;
  again();
});
byId("more_filters").addEventListener("click", () => {
  byId("more_filters").setAttribute("aria-expanded", document.body.classList.toggle("filtering"));
});
byId("more").addEventListener("click", showMore);
addEventListener("scroll", moreIfNear, { passive: true });
byId("by_picture").addEventListener("click", () => byId("file").click());
byId("file").addEventListener("change", () => { sendPart(byId("file").files[0]); byId("file").value = ""; });
byId("help").addEventListener("click", () => byId("keys").showModal());
document.addEventListener("keydown", onKey);
document.addEventListener("dragover", (event) => { event.preventDefault(); byId("drop").hidden = false; });
document.addEventListener("dragleave", (event) => { if (!event.relatedTarget) byId("drop").hidden = true; });
document.addEventListener("drop", (event) => {
  event.preventDefault();
  byId("drop").hidden = true;
  sendPart(event.dataTransfer.files[0]);
});
document.addEventListener("paste", (event) => {
  if (event.clipboardData.files.length) { event.preventDefault(); sendPart(event.clipboardData.files[0]); }
});
addEventListener("popstate", () => { remember(); closeAnswer(); show(); });
history.scrollRestoration = "manual";
showChosen();
showHistory();
fetched("/api/about", {}).then((answer) => {
  index = answer;
  showAbout();
  if (!byId("answers").childElementCount && !document.body.classList.contains("asking")) show();
}).catch((error) => say([error.message], "wrong"));
if (location.search) show();
