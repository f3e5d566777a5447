// Two conversations side by side: the base model and a checkpoint answer the same messages, as they think.
const form = document.getElementById("ask");
const field = (id) => document.getElementById(id);
const sides = { left: [], right: [] };
let running = [];

function turn(side, text, mine) {
  const element = document.createElement("p");
  element.textContent = text;
  if (mine) element.className = "mine";
  field(side).append(element);
  return element;
}

function chosenModel() {
  const option = field("checkpoint").selectedOptions[0];
  return option.dataset.model || field("model").value;
}

function followCheckpoint() {
  const option = field("checkpoint").selectedOptions[0];
  if (option.dataset.model) field("model").value = option.dataset.model;
  field("model").disabled = Boolean(option.dataset.model);
  field("right-pane").hidden = !option.value;
}

async function* events(answer) {
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const lines = (rest + value).split("\n");
    rest = lines.pop();
    for (const line of lines) {
      if (line.startsWith("data: ") && line !== "data: [DONE]") yield JSON.parse(line.slice(6));
    }
  }
}

async function ask(side, model, signal) {
  const history = sides[side];
  const system = field("system").value.trim();
  const messages = system ? [{ role: "system", content: system }, ...history] : [...history];
  const element = turn(side, "…", false);
  let text = "";
  try {
    const answer = await fetch(form.dataset.url, {
      method: "POST",
      headers: { "Content-Type": "application/json" },
      body: JSON.stringify({
        model,
        messages,
        stream: true,
        temperature: Number(field("temperature").value),
        max_tokens: Number(field("max-tokens").value),
      }),
      signal,
    });
    if (!answer.ok) throw new Error((await answer.json()).detail);
    for await (const event of events(answer)) {
      if (event.error) throw new Error(event.error.message);
      text += event.choices[0]?.delta?.content || "";
      element.textContent = text || "…";
    }
    history.push({ role: "assistant", content: text });
    element.dataset.done = "yes";
  } catch (error) {
    if (error.name === "AbortError") {
      history.push({ role: "assistant", content: text });
    } else {
      history.pop(); // the question: it was not answered
      element.textContent = error.message;
      element.className = "problem";
    }
  }
}

async function send(event) {
  event.preventDefault();
  const message = field("message").value.trim();
  if (!message || running.length) return;
  field("message").value = "";
  const checkpoint = field("checkpoint").value;
  const asked = checkpoint ? { left: chosenModel(), right: checkpoint } : { left: chosenModel() };
  for (const side of Object.keys(asked)) {
    turn(side, message, true);
    sides[side].push({ role: "user", content: message });
  }
  running = Object.keys(asked).map(() => new AbortController());
  field("send").disabled = true;
  field("stop").disabled = false;
  await Promise.all(Object.entries(asked).map(([side, model], i) => ask(side, model, running[i].signal)));
  running = [];
  field("send").disabled = false;
  field("stop").disabled = true;
  field("message").focus();
}

function stop() {
  running.forEach((controller) => controller.abort());
}

function clear() {
  stop();
  for (const side of Object.keys(sides)) {
    sides[side].length = 0;
    field(side).replaceChildren();
  }
}

form.addEventListener("submit", send);
field("stop").addEventListener("click", stop);
field("clear").addEventListener("click", clear);
field("checkpoint").addEventListener("change", () => {
  clear();
  followCheckpoint();
});
field("message").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) form.requestSubmit();
});
followCheckpoint();
