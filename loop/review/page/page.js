// The reviewer's page. What a model wrote is only ever set as text: nothing here reads HTML.
"use strict";

let pairs = [], last = null, tags = [], enough = 0;  // what the server says of the whole review
let pair = null, draft = null, current = 0, saving = false;  // the position on the page, and the vote that is being made

function say(text, problem = false) {
  $("status").textContent = text;
  $("status").classList.toggle("problem", problem);
}

async function ask(path, given) {
  let answer;
  try {
    answer = await fetch(path, given && {method: "POST", body: JSON.stringify(given)});
  } catch {
    throw new Error("The server does not answer. Start it again with the same command, then press the same key: nothing is lost.");
  }
  const type = answer.headers.get("content-type") || "";
  const found = type.startsWith("application/json") ? await answer.json() : {error: await answer.text()};
  if (!answer.ok) throw new Error(found.error || `error ${answer.status}`);
  return found;
}

// A vote in the making is kept in this tab: a reload loses nothing, and a vote that is sent twice has the same token.

function newDraft() {
  const bytes = crypto.getRandomValues(new Uint8Array(16));
  const token = Array.from(bytes, (byte) => byte.toString(16).padStart(2, "0")).join("");
  return {token, best: null, second: null, tags: {}, note: ""};
}

function keep() {
  sessionStorage.setItem(pair.id, JSON.stringify(draft));
}

// Showing a position

async function list() {
  ({pairs, last, tags, enough} = await ask("pairs"));
  const voted = pairs.filter((one) => one.voted).length;
  $("count").textContent = `${voted} of ${pairs.length} voted` + (voted < enough ? `; a verdict takes ${enough}` : "");
  $("progress").max = pairs.length;
  $("progress").value = voted;
  $("verdict").disabled = voted < enough;
  return voted;
}

async function open(id) {
  const found = await ask(`pair/${id}`);
  pair = found;
  draft = pair.vote ? {...newDraft(), ...pair.vote} : JSON.parse(sessionStorage.getItem(id)) || newDraft();
  if (pair.vote) sessionStorage.removeItem(id);
  current = 0;
  history.replaceState(null, "", `/#${id}`);
  $("prompt").textContent = pair.prompt;
  $("comments").replaceChildren(...pair.comments.map(card));
  $("note").value = draft.note;
  $("main").hidden = false;
  $("conclusion").hidden = true;
  show("");
  update();
  scrollTo(0, 0);
}

function card({letter, parts}) {
  const text = make("div", {className: "text", dir: "auto", tabIndex: 0}, ...parts.map(([words, shown]) => {
    if (!shown) return words;
    const named = make("button", {type: "button", textContent: words, title: `show ${words} on the board`});
    named.dataset.shown = shown;
    named.onclick = () => show(shown, named);
    return named;
  }));
  if (!text.textContent.trim()) text.append(make("span", {className: "soft"}, "(no words)"));
  text.setAttribute("role", "group");
  text.setAttribute("aria-label", `comment ${letter}`);
  const chips = tags.map((tag, index) => {
    const chip = make("button", {type: "button", onclick: () => toggleTag(letter, tag)}, make("kbd", {}, `${index + 1}`), ` ${tag}`);
    chip.dataset.tag = tag;
    return chip;
  });
  const choose = make("button", {type: "button", className: "main choose", onclick: () => chooseLetter(letter)}, letter);
  const told = pair.told ? [make("div", {className: "told"}, make("strong", {}, pair.told[letter].name),
    make("ul", {}, ...pair.told[letter].flags.map((flag) => make("li", {dir: "auto"}, flag))),
    pair.told[letter].flags.length ? "" : "The automatic checks find nothing wrong.")] : [];
  const node = make("article", {}, make("div", {className: "head"}, choose, make("span", {className: "place"})), text,
    make("div", {className: "row small tags"}, ...chips), ...told);
  node.dataset.letter = letter;
  return node;
}

function show(shown, named = null) {
  $("board").hidden = !pair.board;
  for (const other of document.querySelectorAll("button[data-shown]")) other.setAttribute("aria-pressed", other === named);
  if (!pair.board) return;
  $("board").src = `board/${pair.id}?show=${encodeURIComponent(shown)}`;
  $("board").alt = (shown ? `Shown: ${named.textContent}. ` : "") + pair.board;
  $("shown").hidden = !shown;
  if (shown) $("shown").textContent = `shown: ${named.textContent}${shown[0] === "+" ? ", after the row's move" : ""} (Esc: back)`;
}

function update() {
  const voted = Boolean(pair.vote);
  document.querySelectorAll("article").forEach((node, index) => {
    const letter = node.dataset.letter, best = draft.best === letter, second = draft.second === letter;
    node.classList.toggle("best", best);
    node.setAttribute("aria-current", !voted && index === current);
    node.querySelector(".place").textContent = best ? "best" : second ? "second best" : "";
    const choose = node.querySelector(".choose");
    choose.setAttribute("aria-pressed", best || second);
    choose.setAttribute("aria-label", `comment ${letter} is ${second ? "second best" : "best"}`);
    choose.disabled = voted;
    for (const chip of node.querySelectorAll("[data-tag]")) {
      chip.setAttribute("aria-pressed", (draft.tags[letter] || []).includes(chip.dataset.tag));
      chip.disabled = voted;
    }
  });
  for (const name of ["tie", "bad"]) {
    $(name).setAttribute("aria-pressed", draft.best === name);
    $(name).disabled = voted;
  }
  $("note").disabled = voted;
  $("save-text").textContent = voted ? "Go on" : "Save the vote";
  const number = pairs.findIndex((one) => one.id === pair.id) + 1;
  $("previous").disabled = number === 1;
  $("next").disabled = number === pairs.length;
  $("engine").textContent = pair.engine || "";
  $("choice").textContent = `Position ${number} of ${pairs.length}: ${voted ? "your vote is saved." : chosen()}`;
}

function chosen() {
  if (draft.best === "tie") return "equally good.";
  if (draft.best === "bad") return "none is good.";
  if (draft.second) return `${draft.best} is best, then ${draft.second}.`;
  if (draft.best) return `${draft.best} is best. The others count as even, unless a second letter says which comes next.`;
  return "no choice yet.";
}

// What the keys and buttons do

function edit(change) {
  if (!pair || pair.vote || saving) return;
  change();
  keep();
  update();
  say("");
}

function chooseLetter(letter) {
  edit(() => {
    current = pair.comments.findIndex((comment) => comment.letter === letter);
    if (draft.best === letter) [draft.best, draft.second] = [draft.second, null];
    else if (draft.second === letter) draft.second = null;
    else if (draft.best && !["tie", "bad"].includes(draft.best) && !draft.second) draft.second = letter;
    else [draft.best, draft.second] = [letter, null];
  });
}

const chooseNone = (name) => edit(() => [draft.best, draft.second] = [draft.best === name ? null : name, null]);

function toggleTag(letter, tag) {
  edit(() => {
    const has = draft.tags[letter] || [];
    draft.tags[letter] = has.includes(tag) ? has.filter((other) => other !== tag) : [...has, tag];
  });
}

function move(by) {
  current = (current + by + pair.comments.length) % pair.comments.length;
  update();
  document.querySelectorAll("article")[current].scrollIntoView({block: "nearest"});
}

function showNext() {
  const named = [...document.querySelectorAll("article")[current].querySelectorAll("button[data-shown]")];
  const next = named[named.findIndex((one) => one.getAttribute("aria-pressed") === "true") + 1];
  if (next) show(next.dataset.shown, next);
  else show("");
}

async function save() {
  if (!pair || saving) return;
  if (pair.vote) return goOn();
  if (!draft.best) return say("Choose first: the letter of the best comment, T for a tie, or X if none is good.", true);
  saving = true;
  say("saving ...");
  try {
    Object.assign(pair, await ask("vote", {pair: pair.id, ...draft}));
    sessionStorage.removeItem(pair.id);
    draft = {...newDraft(), ...pair.vote};
    $("comments").replaceChildren(...pair.comments.map(card));
    $("conclusion").hidden = true;  // of fewer votes
    update();
    if ($("answers").getBoundingClientRect().top < 0) $("answers").scrollIntoView();  // what was what, from the first comment
    const voted = await list();
    say(`Saved. Below each comment stands whose it is. ${voted === pairs.length ? "That was the last: V for the verdict." : "Enter leads on."}`);
  } finally {
    saving = false;
  }
}

async function goOn() {
  await list();
  const here = pairs.findIndex((one) => one.id === pair.id);
  const next = [...pairs.slice(here + 1), ...pairs.slice(0, here)].find((one) => !one.voted);
  if (!next) return say("Every position has a vote. V shows the verdict.");
  await open(next.id);
  say("");
}

async function step(by) {
  const here = pairs.findIndex((one) => one.id === pair.id);
  const next = pairs[here + by];
  if (next) await open(next.id);
  say("");
}

async function undo() {
  await list();
  const id = pairs.find((one) => one.id === pair.id && one.voted) ? pair.id : last;
  if (!id) return say("There is no vote to take back.");
  sessionStorage.setItem(id, JSON.stringify({...newDraft(), ...await ask("undo", {pair: id})}));
  await list();
  await open(id);
  say("The vote is taken back, its tags and note are kept. A new one counts, but is marked: you know whose each comment is.");
}

async function conclude() {
  if ($("verdict").disabled) return say(`The verdict takes ${enough} votes.`, true);
  say("computing the verdict ...");
  const {lines} = await ask("verdict", {});
  $("conclusion").replaceChildren(...lines.map((line) => make("li", {}, line)));
  $("conclusion").hidden = false;
  $("conclusion").scrollIntoView({block: "nearest"});
  say(lines[0]);
}

const run = (action) => Promise.resolve().then(action).catch((problem) => say(problem.message, true));

const KEYS = {
  t: () => chooseNone("tie"), x: () => chooseNone("bad"), Enter: save, u: undo, v: conclude, m: showNext, n: () => $("note").focus(),
  "[": () => step(-1), "]": () => step(1), ArrowLeft: () => move(-1), ArrowRight: () => move(1), Escape: () => show(""),
};

document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || event.repeat || !pair) return;
  if (event.target.matches("textarea")) {
    if (event.key === "Escape") event.target.blur();
    return;
  }
  if (event.target.matches("button") && (event.key === "Enter" || event.key === " ")) return;  // the button itself is meant
  const key = event.key.length === 1 ? event.key.toLowerCase() : event.key;
  const letter = pair.comments.find((comment) => comment.letter.toLowerCase() === key);
  const action = letter ? () => chooseLetter(letter.letter) : tags[key - 1]
    ? () => toggleTag(pair.comments[current].letter, tags[key - 1]) : KEYS[key];
  if (!action) return;
  event.preventDefault();
  run(action);
});
document.addEventListener("click", (event) => {  // after a click, Enter is to save, not to press the same button again
  if (event.detail && event.target.closest("button")) event.target.closest("button").blur();
});
$("note").addEventListener("input", () => edit(() => draft.note = $("note").value));
for (const [name, action] of Object.entries({tie: KEYS.t, bad: KEYS.x, save, undo, verdict: conclude, previous: KEYS["["], next: KEYS["]"]}))
  $(name).onclick = () => run(action);

run(async () => {
  const voted = await list();
  const named = pairs.find((one) => one.id === location.hash.slice(1));
  await open((named || pairs.find((one) => !one.voted) || pairs[0]).id);
  if (voted === pairs.length) say("Every position has a vote. V shows the verdict.");
});
