"""Agentic fine-tuning: conversations with tool calls, of which only the assistant's own words are learnt.

The task is arithmetic with a calculator: the user asks, the assistant calls the tool, the tool answers, the
assistant reports. What the user and the tool say is context and weighs nothing. Afterwards the trained model
is let loose on new questions, with the calculator really called. Start a server, then

    python examples/agentic_sft.py --base-url http://127.0.0.1:8000
"""

from __future__ import annotations

import json
import random
import re
from typing import Any

from shared import Run, answer_tokens, connected, decoded, finish, options_for, to_datum
from tinker import types
from tqdm import tqdm

Message = dict[str, str]
CALL = re.compile(r"<call>(.*?)</call>", re.DOTALL)


def calculator(call: str) -> str:
    """What the tool answers; an error is an answer as well."""
    try:
        request = json.loads(call)
        return str({"add": int.__add__, "multiply": int.__mul__}[request["tool"]](*request["numbers"]))
    except (ValueError, KeyError, TypeError) as error:
        return f"error: {type(error).__name__}"


def conversation(number: int) -> list[Message]:
    """One with its calls and answers; the same number gives the same one."""
    choose = random.Random(number)
    a, b = choose.randint(2, 99), choose.randint(2, 99)
    tool, sign = choose.choice([("add", "+"), ("multiply", "*")])
    call = json.dumps({"tool": tool, "numbers": [a, b]})
    result = calculator(call)
    return [
        {"role": "user", "content": f"What is {a} {sign} {b}?"},
        {"role": "assistant", "content": f"<call>{call}</call>"},
        {"role": "tool", "content": result},
        {"role": "assistant", "content": f"It is {result}."},
    ]


def opened(tokenizer: Any, chat: list[Message]) -> list[int]:
    """The chat up to where the assistant goes on: what the model is asked with."""
    text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    tokens: list[int] = tokenizer.encode(text, add_special_tokens=False)
    return tokens


def masked_datums(tokenizer: Any, chat: list[Message]) -> list[types.Datum]:
    """Weight 1 on what the assistant says and on the end of its turn, 0 on everything else.

    Each turn is learnt behind the very prompt that it will be asked with. One datum holds them all where a
    prompt goes on from the turn before it; templates that write earlier turns differently (some leave out
    what was thought) need one for each such turn.
    """
    data: list[types.Datum] = []
    tokens: list[int] = []
    weights: list[float] = []
    for turn, message in enumerate(chat):
        if message["role"] == "assistant":
            prompt, answer = opened(tokenizer, chat[:turn]), answer_tokens(tokenizer, message["content"])
            if prompt[: len(tokens)] != tokens:
                data.append(to_datum(tokens, weights=weights))
                tokens, weights = [], []
            weights += [0.0] * (len(prompt) - len(tokens)) + [1.0] * len(answer)
            tokens = prompt + answer
    return [*data, to_datum(tokens, weights=weights)]


def after_thinking(text: str) -> str:
    """What is said to the user."""
    return text.rpartition("</think>")[2].strip()


def let_loose(run: Run, numbers: range) -> int:
    """How many new questions the model answers rightly, with the tool in its hands."""
    sampler, num_right = run.sampler(), 0
    params = types.SamplingParams(max_tokens=48, temperature=0.0, stop=[run.tokenizer.eos_token_id])
    for number in tqdm(numbers, desc="new questions", dynamic_ncols=True):
        expected = conversation(number)
        chat = expected[:1]
        for _ in range(2):
            prompt = types.ModelInput.from_ints(opened(run.tokenizer, chat))
            answer = sampler.sample(prompt, 1, params).result().sequences[0]
            said = after_thinking(decoded(run.tokenizer, answer.tokens))
            chat = [*chat, {"role": "assistant", "content": said}]
            call = CALL.search(said)
            if call is None:
                break
            chat.append({"role": "tool", "content": calculator(call.group(1))})
        num_right += chat[-1]["content"] == expected[-1]["content"]
    return num_right


def main(arguments: list[str] | None = None) -> None:
    parser = options_for(__doc__, steps=40, learning_rate=1e-3)
    parser.add_argument("--batch-size", type=int, default=8, help="conversations a step")
    parser.add_argument("--questions", type=int, default=10, help="new ones asked afterwards")
    options = parser.parse_args(arguments)
    losses = []
    with connected(options) as run:
        for step in (progress := tqdm(range(options.steps), unit="step", dynamic_ncols=True)):
            first = step * options.batch_size
            numbers = range(first, first + options.batch_size)
            batch = [
                datum for number in numbers for datum in masked_datums(run.tokenizer, conversation(number))
            ]
            metrics = run.step(batch, "cross_entropy", options.learning_rate)
            losses.append(metrics["loss:sum"] / metrics["weight:sum"])
            progress.set_postfix(loss=f"{losses[-1]:.3f}")
        num_right = let_loose(run, range(10_000, 10_000 + options.questions))
    print(f"right: {num_right} of {options.questions} new questions")
    finish("Agentic SFT", {"loss per assistant token": losses}, options)


if __name__ == "__main__":
    main()
