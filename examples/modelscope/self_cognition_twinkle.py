"""The hosted service's first program: twinkle's data tools and the tinker SDK, on a server of your own.

It is the program that a user of the hosted service has, except for the address, the key and where data and
tokenizer lie. It needs its own environment, because twinkle-kit pins an older SDK (see README.md).
"""

import os
from typing import Any

from tqdm import tqdm
from twinkle_client import init_tinker_client

# Before anything else of tinker is imported: this lets it take any key.
init_tinker_client()

from tinker import ServiceClient, types  # noqa: E402
from twinkle.dataloader import DataLoader  # noqa: E402
from twinkle.dataset import Dataset, DatasetMeta  # noqa: E402
from twinkle.preprocessor import SelfCognitionProcessor  # noqa: E402

try:  # twinkle-kit 0.1
    from twinkle.server.tinker.common import input_feature_to_datum
except ImportError:  # twinkle-kit 0.5
    from twinkle.server.common import input_feature_to_datum

BASE_URL = os.environ.get("TWINKLE_SERVER_URL", "http://127.0.0.1:8000")
API_KEY = os.environ.get("TWINKLE_SERVER_TOKEN", "any key will do")
BASE_MODEL = os.environ["TWINKLE_MODEL"]  # as the server calls it
TOKENIZER = os.environ.get("TWINKLE_TOKENIZER", BASE_MODEL)  # a directory, or its name on ModelScope
DATA = os.environ.get("TWINKLE_DATA", "../data/self_cognition.jsonl")
NUM_ROWS = int(os.environ.get("TWINKLE_ROWS", "100"))
EPOCHS = int(os.environ.get("TWINKLE_EPOCHS", "3"))
LEARNING_RATE = float(os.environ.get("TWINKLE_LEARNING_RATE", "1e-4"))


def load_batches() -> DataLoader:
    dataset = Dataset(DatasetMeta(DATA, data_slice=range(NUM_ROWS)))
    dataset.set_template("Template", model_id=TOKENIZER, max_length=256)
    dataset.map(SelfCognitionProcessor("Twinkle", "the ModelScope community"), load_from_cache_file=False)
    dataset.encode(batched=True, load_from_cache_file=False)
    return DataLoader(dataset, batch_size=8)


def ask(sampler: Any, tokenizer: Any) -> str:
    chat = [{"role": "user", "content": "Who are you?"}]
    text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    prompt = types.ModelInput.from_ints(tokenizer.encode(text, add_special_tokens=False))
    params = types.SamplingParams(max_tokens=48, temperature=0.0, stop=[tokenizer.eos_token_id])
    result = sampler.sample(prompt=prompt, num_samples=1, sampling_params=params).result()
    answer: str = tokenizer.decode(result.sequences[0].tokens, skip_special_tokens=True)
    return answer.strip()


def train() -> None:
    batches = load_batches()
    service = ServiceClient(base_url=BASE_URL, api_key=API_KEY)
    client = service.create_lora_training_client(base_model=BASE_MODEL, rank=16)
    tokenizer = client.get_tokenizer()
    print("before:", ask(service.create_sampling_client(base_model=BASE_MODEL), tokenizer))
    for epoch in range(EPOCHS):
        for batch in tqdm(batches, desc=f"epoch {epoch}"):
            datums = [input_feature_to_datum(feature) for feature in batch]
            backward = client.forward_backward(datums, "cross_entropy")
            step = client.optim_step(types.AdamParams(learning_rate=LEARNING_RATE))
            loss = backward.result().metrics["loss:sum"]
            step.result()
        saved = client.save_state(f"twinkle-lora-{epoch}").result()
        print(f"epoch {epoch}: loss of the last batch {loss:.2f}, saved {saved.path}")
    # What another program would do with the path, under either of its spellings.
    path = saved.path.replace("tinker://", "twinkle://")
    print("after:", ask(service.create_sampling_client(model_path=path), tokenizer))


if __name__ == "__main__":
    train()
