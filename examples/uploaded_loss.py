"""A loss of your own that runs on the server: traced here, checked there, one request a step.

The SDK traces an ordinary function of torch operations and uploads the trace as plain data (SDK 0.38 and
newer; older ones have `forward_backward_custom` with a function, see dpo.py, which takes two requests a
step). The loss here is a focal cross entropy: tokens that the model already knows count less. Start a
server, then

    python examples/uploaded_loss.py --base-url http://127.0.0.1:8000
"""

from __future__ import annotations

import torch
from pretraining import page
from shared import connected, finish, options_for, to_datum
from tinker import types
from tqdm import tqdm

GAMMA = 2.0


def focal(logprobs: torch.Tensor, weights: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Called once for each datum; losses are added up. A metric's suffix says how it is put together."""
    doubt = (1 - logprobs.detach().exp()) ** GAMMA
    loss = -(doubt * logprobs * weights).sum()
    plain = -(logprobs * weights).sum()
    return loss, {"custom/plain:sum": plain, "custom/tokens:sum": weights.sum()}


def main(arguments: list[str] | None = None) -> None:
    options = options_for(__doc__, steps=30, learning_rate=1e-3).parse_args(arguments)
    losses, plain = [], []
    with connected(options) as run:
        handle = run.service.create_custom_loss(focal, {"logprobs": 1, "weights": 1}).result()
        print(f"runs {'on the server as ' + handle.loss_id if handle.loss_id else 'in this process'}")
        for step in (progress := tqdm(range(options.steps), unit="step", dynamic_ncols=True)):
            texts = [page(8 * step + number) for number in range(8)]
            batch = [run.tokenizer.encode(text, add_special_tokens=False) for text in texts]
            data = [to_datum(tokens, weights=[1.0] * len(tokens)) for tokens in batch]
            backward = run.client.forward_backward_custom(data, handle)
            adam = run.client.optim_step(types.AdamParams(learning_rate=options.learning_rate))
            metrics = backward.result().metrics
            adam.result()
            losses.append(metrics["loss:sum"] / metrics["custom/tokens:sum"])
            plain.append(metrics["custom/plain:sum"] / metrics["custom/tokens:sum"])
            progress.set_postfix(focal=f"{losses[-1]:.3f}", plain=f"{plain[-1]:.3f}")
    finish("Uploaded loss", {"focal loss per token": losses, "plain loss per token": plain}, options)


if __name__ == "__main__":
    main()
