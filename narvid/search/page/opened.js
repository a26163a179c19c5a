// An open answer, chosen moments, keys. What is asked for, and the state, stands in page.js.
"use strict";

// ---- an open answer ----

function openAnswer(number) {
  const answer = result && result.answers[number];
  if (!answer) return;
  const body = byId("answer_body");
  if (body.firstChild) body.firstChild.video.leave();
  opened = number;
  const moment = { path: answer.path, file: answer.file, start: answer.start, end: answer.end, words: answer.words };
  const detail = makeDetail(answer, {
    like: () => go({ like: answer.window }),
    combine: () => goParts(wordsOf(), [...partsOf(), { sign: "+", by: 1, kind: "window", value: String(answer.window) }]),
    choose: () => toggleChosen(moment),
    isChosen: () => isChosen(moment),
    say: (text) => { detail.said.textContent = text; },
  }, local);
  body.replaceChildren(detail);
  byId("answer_title").textContent = answer.rank + ". " + fileOf(answer.path);
  byId("previous").disabled = number === 0;
  byId("next").disabled = number + 1 >= result.answers.length;
  if (!byId("answer").open) byId("answer").showModal();
  byId("answer").scrollTop = 0;
  detail.video.jump(answer.moment);
  if (number + 3 > result.answers.length) showMore();
}

function closeAnswer() {
  if (byId("answer").open) byId("answer").close();
}

byId("answer").addEventListener("close", () => {
  const body = byId("answer_body");
  if (body.firstChild) body.firstChild.video.leave();
  body.replaceChildren();
  const cards = [...byId("answers").children];
  if (cards[opened]) focusCard(cards, opened);
  opened = -1;
});
byId("close").addEventListener("click", closeAnswer);
byId("previous").addEventListener("click", () => openAnswer(opened - 1));
byId("next").addEventListener("click", () => openAnswer(opened + 1));
byId("answer").addEventListener("click", (event) => { if (event.target === byId("answer")) closeAnswer(); });

// ---- chosen moments ----

const keyOf = (moment) => moment.path + "\0" + moment.start;
const isChosen = (moment) => kept.read("narvid_chosen").some((c) => keyOf(c) === keyOf(moment));

function toggleChosen(moment) {
  const others = kept.read("narvid_chosen").filter((c) => keyOf(c) !== keyOf(moment));
  const on = !isChosen(moment);
  kept.write("narvid_chosen", on ? [...others, moment] : others);
  showChosen();
  return on;
}

function showChosen() {
  const chosen = kept.read("narvid_chosen");
  byId("chosen").hidden = !chosen.length;
  byId("chosen").querySelector(".count").textContent = chosen.length;
  byId("tray").querySelector("ol").replaceChildren(...chosen.map((moment) => make("li", "", null,
    make("span", "", null, make("b", "number", clock(moment.start) + "–" + clock(moment.end)), " " + moment.path),
    makeButton("Remove", () => { toggleChosen(moment); if (!kept.read("narvid_chosen").length) byId("tray").close(); }))));
}

function download(name, text, type) {
  const link = make("a");
  link.href = URL.createObjectURL(new Blob([text], { type }));
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10000);
}

byId("chosen").addEventListener("click", () => byId("tray").showModal());
byId("edl").addEventListener("click", () => download("moments.edl", asEdl(kept.read("narvid_chosen")), "text/plain"));
byId("csv").addEventListener("click", () => download("moments.csv", asCsv(kept.read("narvid_chosen")), "text/csv"));
byId("forget").addEventListener("click", () => { kept.write("narvid_chosen", []); showChosen(); byId("tray").close(); });
for (const button of document.querySelectorAll("dialog .close")) {
  button.addEventListener("click", () => button.closest("dialog").close());
}

// ---- keys ----

function focusCard(cards, at) {
  for (const [n, card] of cards.entries()) card.firstChild.tabIndex = n === at ? 0 : -1;
  cards[at].firstChild.focus();
  cards[at].scrollIntoView({ block: "nearest" });
}

function step(key) {
  const cards = [...byId("answers").children];
  if (!cards.length) return;
  const at = cards.findIndex((card) => card.contains(document.activeElement));
  if (at < 0) { focusCard(cards, 0); return; }
  const columns = cards.filter((card) => card.offsetTop === cards[0].offsetTop).length;
  const next = at + { ArrowRight: 1, ArrowLeft: -1, ArrowDown: columns, ArrowUp: -columns }[key];
  if (next < 0 && key === "ArrowUp") { byId("q").focus(); return; }
  if (cards[next]) focusCard(cards, next);
}

function onKey(event) {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  const target = event.target, detail = byId("answer").open ? byId("answer_body").firstChild : null;
  if (["INPUT", "SELECT"].includes(target.tagName)) {
    if (event.key === "Escape" && target.id === "q") target.blur();
    if (event.key === "ArrowDown" && target.id === "q") { event.preventDefault(); step(event.key); }
    return;
  }
  let act = null;
  if (detail) {
    const video = detail.video, watching = target === video;
    act = { m: () => detail.like.click(), c: () => detail.choose.click(),
      ...(watching ? {} : { ArrowLeft: () => openAnswer(opened - 1), ArrowRight: () => openAnswer(opened + 1) }),
      ...(target.closest("button, a, summary") || watching ? {}
        : { " ": () => (video.paused ? video.play().catch(() => {}) : video.pause()) }) }[event.key];
  } else if (!document.querySelector("dialog[open]")) {
    act = { "/": () => { byId("q").focus(); byId("q").select(); }, "?": () => byId("keys").showModal() }[event.key];
    if (event.key.startsWith("Arrow") && (target === document.body || target.closest("#answers"))) act = () => step(event.key);
    const card = target.closest && target.closest("#answers .card");
    if (card && (event.key === "m" || event.key === "c")) {
      const answer = result.answers[[...byId("answers").children].indexOf(card)];
      act = event.key === "m" ? () => go({ like: answer.window }) : () => toggleChosen(
        { path: answer.path, file: answer.file, start: answer.start, end: answer.end, words: answer.words });
    }
  }
  if (!act) return;
  event.preventDefault();
  act();
}
