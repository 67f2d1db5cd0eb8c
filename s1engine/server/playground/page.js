/* The page: settings become requests, and turns a conversation. */

import { curl, python } from "./code.js";
import { Run, call } from "./run.js";

const $ = id => document.getElementById(id);
const RETRY_MS = 2000;  /* until the server is asked for its model again */
const TURNS = [];  /* {question, runs, kept}: kept is the run whose answer the next turn follows */
const MODEL = { name: null, context: 512, thinks: true };

/* --- fields --- */

const numbersOf = field => field.value.split(",").map(part => part.trim()).filter(Boolean);
const numberOf = field => (field.value === "" ? null : Number(field.value));

function problemOf(field) {
  const name = field.labels[0].firstChild.textContent.trim().replace(/:$/, "").split(",")[0];
  if (field.dataset.numbers === undefined) return field.checkValidity() ? "" : `${name}: ${field.validationMessage}`;
  const numbers = numbersOf(field);
  const wrong = numbers.find(part => !/^\d+$/.test(part) || Number(part) > MODEL.context);
  if (wrong !== undefined)
    return `${name}: "${wrong}" is not a number of tokens from 0 to ${MODEL.context}, the context of the model.`;
  const most = Number(field.dataset.most);
  return numbers.length > most ? `${name}: at most ${most} numbers.` : "";
}

/* Shows the first problem of the fields; true if there is none. */
function check() {
  const fields = [...$("form").querySelectorAll("input, textarea")].filter(field => !field.closest("[hidden]"));
  const problems = fields.map(problemOf);
  fields.forEach((field, i) => { field.ariaInvalid = String(Boolean(problems[i])); });
  const first = problems.findIndex(Boolean);
  $("problem").textContent = first < 0 ? "" : problems[first];
  if (first < 0) return true;
  if ($("settings").contains(fields[first])) $("settings").open = true;
  fields[first].focus();
  return false;
}

/* --- the slider: cubic, since short budgets matter most --- */

const budgetFor = position => Math.round(MODEL.context * (position / 1000) ** 3);
const positionFor = budget => Math.round(1000 * Math.cbrt(Math.min(1, budget / MODEL.context)));

function showSlider(budget) {
  $("slid").textContent = `${budget} tokens`;
  $("slider").ariaValueText = $("slid").textContent;
}

function moveSlider() {
  const [budget] = numbersOf($("budgets"));
  if (!/^\d+$/.test(budget ?? "")) return;
  $("slider").value = positionFor(Number(budget));
  showSlider(Number(budget));
}

/* --- requests --- */

function messages() {
  const system = $("system").value.trim();
  const earlier = TURNS.flatMap(({ question, kept }) => [
    { role: "user", content: question },
    { role: "assistant", content: kept.text },
  ]);
  return [
    ...(system ? [{ role: "system", content: system }] : []),
    ...earlier,
    { role: "user", content: $("question").value },
  ];
}

/* The body of one run; fields that were left empty are not sent. */
function bodyOf(budget) {
  const checkpoints = numbersOf($("checkpoints")).map(Number).filter(at => budget === null || at <= budget);
  const fields = {
    temperature: numberOf($("temperature")),
    max_tokens: numberOf($("maxTokens")),
    ...(MODEL.thinks && {
      thinking_token_budget: budget,
      num_waits: numberOf($("waits")),
      wait_text: $("waitText").value || null,
      thinking_checkpoints: checkpoints.length ? checkpoints : null,
    }),
  };
  return {
    ...(MODEL.name && { model: MODEL.name }),
    messages: messages(),
    stream: true, stream_options: { include_usage: true }, return_token_ids: true,
    ...Object.fromEntries(Object.entries(fields).filter(([, value]) => value !== null)),
  };
}

/* --- turns --- */

function createRun(budget, turn) {
  const title = budget === null ? (MODEL.thinks ? "no budget" : "answer") : `budget ${budget}`;
  const run = new Run(budget, bodyOf(budget), {
    key: $("key").value, title, onCode: showCode, onKeep: chosen => keep(turn, chosen),
  });
  run.keep.firstElementChild.name = `turn${TURNS.length}`;
  return run;
}

function keep(turn, run) {
  turn.kept = run;
  for (const { card } of turn.runs) card.classList.toggle("kept", turn.runs.length > 1 && card === run.card);
  run.keep.firstElementChild.checked = true;
}

async function ask() {
  if ($("ask").disabled || !check()) return;
  const turn = { question: $("question").value };
  const budgets = MODEL.thinks ? numbersOf($("budgets")).map(Number) : [];
  turn.runs = (budgets.length ? budgets : [null]).map(budget => createRun(budget, turn));
  const section = showTurn(turn);
  setBusy(true, turn);
  await Promise.all(turn.runs.map(run => run.start()));
  setBusy(false);
  announce(turn);
  const answered = turn.runs.filter(run => run.text && !run.failed);
  if (!answered.length) return refuse(turn, section);
  TURNS.push(turn);
  for (const run of answered) run.keep.hidden = answered.length < 2;
  keep(turn, answered.at(-1));
  $("clear").hidden = false;
  $("question").value = "";
  $("question").focus();
}

function showTurn(turn) {
  document.querySelector("section.refused")?.remove();
  const section = document.createElement("section");
  section.innerHTML = `<p class="question"></p><div class="runs"></div>`;
  section.firstElementChild.textContent = turn.question;
  section.lastElementChild.append(...turn.runs.map(run => run.card));
  $("turns").append(section);
  section.scrollIntoView({ block: "nearest" });
  return section;
}

/* A turn without an answer is no part of the conversation; its question stays in the field. */
function refuse(turn, section) {
  section.className = "refused";
  if (turn.runs.some(run => run.error?.status === 401)) askForKey();
}

function askForKey() {
  $("settings").open = true;
  $("key").focus();
}

function setBusy(busy, turn) {
  $("ask").disabled = busy;
  $("stop").hidden = !busy;
  $("clear").disabled = busy;
  $("stop").onclick = () => turn.runs.forEach(run => run.stop());
}

/* Says in words how the runs ended, for those who do not see them. */
function announce({ runs }) {
  $("progress").textContent = runs
    .map(run => `${run.card.querySelector("h2 span").textContent}: ${run.text} ${run.facts.textContent}`)
    .join(". ");
}

function clear() {
  TURNS.length = 0;
  $("turns").replaceChildren();
  $("clear").hidden = true;
  $("question").focus();
}

function showCode(kind, body) {
  $("codeTitle").textContent = `This request with ${kind}`;
  const pre = $("code").querySelector("pre");
  pre.textContent = kind === "curl" ? curl(body) : python(body);
  $("copy").textContent = "Copy";
  $("copy").onclick = async () => {
    getSelection().selectAllChildren(pre);
    /* Without a secure connection there is no clipboard: the text is selected. */
    await navigator.clipboard?.writeText(pre.textContent);
    $("copy").textContent = navigator.clipboard ? "Copied" : "Selected: press Ctrl+C";
  };
  $("code").showModal();
}

/* --- the server --- */

async function connect() {
  let model;
  try {
    ({ data: [model] } = await (await call("v1/models", $("key").value)).json());
  } catch (error) {
    $("model").textContent = error.message;
    if (error.status === 401) return askForKey();
    return setTimeout(connect, RETRY_MS);
  }
  Object.assign(MODEL, { name: model.id, context: model.max_model_len, thinks: Boolean(model.reasoning_format) });
  $("model").textContent = `${model.id} \u00b7 context ${model.max_model_len}`
    + (MODEL.thinks ? "" : " \u00b7 this model has no thinking");
  for (const part of document.querySelectorAll("[data-thinking]")) part.hidden = !MODEL.thinks;
  $("maxTokens").max = model.max_model_len;
  moveSlider();
}

/* A link may carry fields: #question=...&budgets=8,64&go=1. The server never sees this part. */
function applyLink() {
  const link = new URLSearchParams(location.hash.slice(1));
  for (const [name, value] of link)
    if ($(name)?.matches("#form input, #form textarea")) $(name).value = value;
  return Boolean(link.get("go"));
}

$("form").onsubmit = event => { event.preventDefault(); ask(); };
$("form").onkeydown = event => {
  if (event.key !== "Enter" || !(event.ctrlKey || event.metaKey)) return;
  event.preventDefault();
  ask();
};
$("clear").onclick = clear;
$("key").onchange = connect;
$("budgets").oninput = moveSlider;
$("slider").oninput = () => {
  const budget = budgetFor(Number($("slider").value));
  showSlider(budget);
  $("budgets").value = budget;
};
addEventListener("pagehide", () => $("stop").onclick?.());
$("settings").open = matchMedia("(min-width: 720px)").matches;
const go = applyLink();
moveSlider();
await connect();
if (go) ask();
