"""math_rl with a penalty on the divergence from a reference, as a program of a user.

    python math_rl_kl.py MODEL LOG_PATH [START REFERENCE]

The recipe's own command line has ``kl_penalty_coef``, but in tinker-cookbook 0.6.1 it passes on no
``kl_reference_config``, and ``rl.train.main`` refuses a penalty without one. So this fills in that ``Config``
as the recipe's ``cli_main`` does, and calls the same ``main`` on the recipe's own data. START and REFERENCE
are checkpoints; without them both are the base model. Runs with the cookbook's Python.
"""

from __future__ import annotations

import asyncio
import sys

from tinker_cookbook import model_info
from tinker_cookbook.recipes.math_rl.train import get_dataset_builder
from tinker_cookbook.rl.train import Config, KLReferenceConfig, main


def config(model: str, log_path: str, start: str | None, reference: str | None) -> Config:
    renderer = model_info.get_recommended_renderer_name(model)
    return Config(
        model_name=model,
        recipe_name="recipe_math_rl",
        log_path=log_path,
        dataset_builder=get_dataset_builder("arithmetic", 2, model, renderer, group_size=4),
        renderer_name=renderer,
        loss_fn="importance_sampling",
        lora_rank=8,
        learning_rate=1e-3,
        max_tokens=5,
        max_steps=3,
        eval_every=0,
        save_every=0,
        load_checkpoint_path=start,
        kl_penalty_coef=0.1,
        kl_reference_config=KLReferenceConfig(base_model=model, load_checkpoint_path=reference),
    )


if __name__ == "__main__":
    model, log_path, start, reference = (*sys.argv[1:], None, None)[:4]
    assert model is not None
    assert log_path is not None
    asyncio.run(main(config(model, log_path, start, reference)))
