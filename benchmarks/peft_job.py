"""One fine-tuning job as a researcher runs it: ``python peft_job.py MODEL RATE STEPS TOKENS`` loads the
model, trains rank-8 LoRA with torch and PEFT on one thread, prints the last loss. Knows nothing of the
service.
"""

from __future__ import annotations

import sys

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

DATUM_TOKENS = 64


def main(directory: str, rate: float, steps: int, tokens: int) -> float:
    torch.set_num_threads(1)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    vocabulary = model.config.vocab_size
    lora = LoraConfig(
        r=8,
        lora_alpha=32,
        target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "lm_head"],
        target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
    )
    model = get_peft_model(model, lora)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate)
    draw = torch.Generator().manual_seed(0)
    words = torch.randint(5, vocabulary, (max(1, tokens // DATUM_TOKENS), DATUM_TOKENS + 1), generator=draw)
    loss = torch.zeros(())
    for _ in range(steps):
        logits = model(input_ids=words[:, :-1], use_cache=False).logits.flatten(0, 1)
        loss = torch.nn.functional.cross_entropy(logits, words[:, 1:].flatten(), reduction="sum")
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return float(loss)


if __name__ == "__main__":
    print(main(sys.argv[1], float(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])))
