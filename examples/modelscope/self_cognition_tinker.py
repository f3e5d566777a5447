"""The program of self_cognition_twinkle.py for the newest tinker SDK, without twinkle-kit.

The same data, batches, steps and saves; the two dozen lines that turn a row into a datum are here instead
of in a package. The key must begin with tml-, which the SDK itself wants. Start a server, then

    TWINKLE_MODEL=... python examples/modelscope/self_cognition_tinker.py
"""

import json
import os
from pathlib import Path
from typing import Any

from tinker import SamplingClient, ServiceClient, types
from tqdm import tqdm

BASE_URL = os.environ.get("TWINKLE_SERVER_URL", "http://127.0.0.1:8000")
API_KEY = os.environ.get("TWINKLE_SERVER_TOKEN", "tml-any key will do")
BASE_MODEL = os.environ["TWINKLE_MODEL"]  # as the server calls it
DATA = Path(os.environ.get("TWINKLE_DATA", Path(__file__).parent.parent / "data" / "self_cognition.jsonl"))
NUM_ROWS = int(os.environ.get("TWINKLE_ROWS", "100"))
EPOCHS = int(os.environ.get("TWINKLE_EPOCHS", "3"))
LEARNING_RATE = float(os.environ.get("TWINKLE_LEARNING_RATE", "1e-4"))
BATCH_SIZE = 8


def prompt_of(tokenizer: Any, question: str) -> list[int]:
    chat = [{"role": "user", "content": question}]
    text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    tokens: list[int] = tokenizer.encode(text, add_special_tokens=False)
    return tokens


def to_datum(tokenizer: Any, row: dict[str, str]) -> types.Datum:
    """Position t predicts token t + 1, and only the answer is learnt."""
    prompt = prompt_of(tokenizer, row["query"])
    answer = tokenizer.encode(row["response"] + tokenizer.eos_token, add_special_tokens=False)
    tokens, weights = prompt + answer, [0.0] * (len(prompt) - 1) + [1.0] * len(answer)
    inputs = {
        "target_tokens": types.TensorData(data=tokens[1:], dtype="int64", shape=[len(weights)]),
        "weights": types.TensorData(data=weights, dtype="float32", shape=[len(weights)]),
    }
    return types.Datum(model_input=types.ModelInput.from_ints(tokens[:-1]), loss_fn_inputs=inputs)


def load_batches(tokenizer: Any) -> list[list[types.Datum]]:
    text = DATA.read_text(encoding="utf-8")
    text = text.replace("{{NAME}}", "Twinkle").replace("{{AUTHOR}}", "the ModelScope community")
    data = [to_datum(tokenizer, json.loads(line)) for line in text.splitlines()[:NUM_ROWS]]
    return [data[start : start + BATCH_SIZE] for start in range(0, len(data), BATCH_SIZE)]


def ask(sampler: SamplingClient, tokenizer: Any) -> str:
    prompt = types.ModelInput.from_ints(prompt_of(tokenizer, "Who are you?"))
    params = types.SamplingParams(max_tokens=48, temperature=0.0, stop=[tokenizer.eos_token_id])
    result = sampler.sample(prompt=prompt, num_samples=1, sampling_params=params).result()
    answer: str = tokenizer.decode(result.sequences[0].tokens, skip_special_tokens=True)
    return answer.strip()


def train() -> None:
    with ServiceClient(base_url=BASE_URL, api_key=API_KEY) as service:
        client = service.create_lora_training_client(base_model=BASE_MODEL, rank=16).result()
        tokenizer = client.get_tokenizer()
        batches = load_batches(tokenizer)
        print("before:", ask(service.create_sampling_client(base_model=BASE_MODEL).result(), tokenizer))
        for epoch in range(EPOCHS):
            for batch in tqdm(batches, desc=f"epoch {epoch}"):
                backward = client.forward_backward(batch, "cross_entropy")
                step = client.optim_step(types.AdamParams(learning_rate=LEARNING_RATE))
                loss = backward.result().metrics["loss:sum"]
                step.result()
            saved = client.save_state(f"twinkle-lora-{epoch}").result()
            print(f"epoch {epoch}: loss of the last batch {loss:.2f}, saved {saved.path}")
        print("after:", ask(service.create_sampling_client(model_path=saved.path).result(), tokenizer))


if __name__ == "__main__":
    train()
