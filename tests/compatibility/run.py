"""Puts AutoAmortizedNormal where the guides of Pyro's examples stand, and writes how it does.

    python tests/compatibility/run.py [--pyro PATH] [--only NAME] [--again]

The models are read from a checkout of Pyro and not changed. Results are kept, example by example, in results.json, so
that an interrupted run goes on where it was; README.md is made from them.
"""

from __future__ import annotations

import argparse
import json
import math
import time
import warnings
from pathlib import Path
from typing import Any

import pyro
import torch
from examples import EXAMPLES, REMARKS, Example, Task
from pyro.infer import SVI
from sources import RELEASE, checkout, version
from torch import Tensor, nn

from pyro_amortize import AutoAmortizedNormal

HERE = Path(__file__).parent
SEEDS = (0, 1, 2)
OURS, OWN = "ours", "own"


def main() -> None:
    """Runs the examples that have no result yet."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pyro", help=f"a checkout of Pyro; without, release {RELEASE} is cloned")
    parser.add_argument("--only", action="append", help="name of an example; may be given more than once")
    parser.add_argument("--again", action="store_true", help="run also what has a result")
    parser.add_argument("--steps", type=int, help="at most so many steps, one seed, and nothing is kept: a quick look")
    args = parser.parse_args()
    root = checkout(args.pyro, HERE / ".pyro")
    kept = HERE / "results.json"
    results = json.loads(kept.read_text()) if kept.exists() else {}
    for name in args.only or EXAMPLES:
        if name in results and not args.again and args.steps is None:
            continue
        result = {**run(EXAMPLES[name], root, args.steps), "checkout": version(root)}
        print(f"{name}: {summary(result)}", flush=True)
        if args.steps is None:
            results[name] = result
            kept.write_text(json.dumps(results, indent=1) + "\n")
            (HERE / "README.md").write_text(page(results))
    (HERE / "README.md").write_text(page(results))


# Running.


def run(example: Example, root: Path, steps: int | None = None) -> dict[str, Any]:
    """Trains both guides of an example from each seed; returns final ELBOs, or why there are none.

    Where ours fails, the example's own is only tried for a few steps.
    """
    result: dict[str, Any] = {OURS: [], OWN: [], "seconds": {OURS: 0.0, OWN: 0.0}}
    for which in (OURS, OWN):
        steps = 5 if f"{OURS} fails" in result else steps
        for seed in SEEDS if steps is None else SEEDS[:1]:
            start = time.process_time()
            try:
                elbo, made = train(example, root, which, seed, steps)
            except Exception as error:
                result[f"{which} fails"] = f"{type(error).__name__}: {error}".partition("Trace Shapes")[0].strip()
                break
            result[which].append(elbo)
            result["seconds"][which] += time.process_time() - start
            result.update(made)
    return result


def train(example: Example, root: Path, which: str, seed: int, steps: int | None) -> tuple[float, dict[str, Any]]:
    """Trains one guide from one seed; returns its final ELBO, and what is to be told of it."""
    pyro.clear_param_store()
    pyro.set_rng_seed(seed)
    with warnings.catch_warnings(), pyro.settings.context(module_local_params=example.local):
        warnings.simplefilter("ignore")
        task = example.make(root / example.source)
        guide = task.own if which == OWN else AutoAmortizedNormal(task.guided or task.model, **task.options)
        if which == OURS:
            guide.initialize(*task.args, **task.kwargs)
        number = min(task.steps, steps or task.steps)
        loss = task.loss()
        take = _torch_steps(task, guide, loss) if example.local else _steps(task, guide, loss)
        for step in range(number):
            take(*(task.batch(step) if task.batch else task.args))
        elbo = evaluate(task, guide, loss, task.draws if steps is None else 2)
    told = {"steps": number}
    if which == OURS:
        told["blocks"] = [f"{'encoder' if b.amortized else 'table'}: {', '.join(b.sites)}" for b in guide.plan.blocks]
        told["left"] = list(guide.plan.left_to_model)
        told["summed out"] = list(guide.plan.enumerated)
    return elbo, told


def _steps(task: Task, guide: Any, loss: Any) -> Any:
    svi = SVI(task.model, guide, task.optim(), loss)
    return lambda *args: svi.step(*args, **task.kwargs)


def _torch_steps(task: Task, guide: Any, loss: Any) -> Any:
    """Trains as a torch module, as the examples without the param store do."""
    objective = loss(task.model, guide)
    objective(*task.args, **task.kwargs)
    optimizer = torch.optim.Adam(objective.parameters(), lr=0.01)

    def take(*args: Any) -> None:
        optimizer.zero_grad()
        objective(*args, **task.kwargs).backward()
        optimizer.step()

    return take


def evaluate(task: Task, guide: Any, loss: Any, draws: int) -> float:
    """Returns the ELBO on all data, the mean of many evaluations, networks in eval mode."""
    for part in (task.network, guide):
        if isinstance(part, nn.Module):
            part.eval()
    with torch.no_grad():
        losses = [float(loss.loss(task.model, guide, *task.args, **task.kwargs)) for _ in range(draws)]
    if not all(map(math.isfinite, losses)):
        raise ValueError(f"the loss after training is {losses[0]}")
    return -sum(losses) / draws


# Telling.


def _mean_se(values: list[float]) -> tuple[float, float]:
    values_: Tensor = torch.tensor(values, dtype=torch.float64)
    return float(values_.mean()), float(values_.std() / math.sqrt(len(values))) if len(values) > 1 else 0.0


def judge(result: dict[str, Any]) -> tuple[float, float, bool] | None:
    """Returns the difference ours - own, its standard error over seeds, and whether ours is worse."""
    if not result[OURS] or len(result[OURS]) != len(result[OWN]):
        return None
    difference, se = _mean_se([a - b for a, b in zip(result[OURS], result[OWN], strict=True)])
    return difference, se, difference < -max(0.01 * abs(_mean_se(result[OWN])[0]), 2 * se)


def _differs(result: dict[str, Any]) -> bool:
    """Whether the ELBOs differ beyond the bounds within which ours would not be called worse."""
    swapped = {**result, OURS: result[OWN], OWN: result[OURS]}
    return any(judged is not None and judged[2] for judged in (judge(result), judge(swapped)))


def summary(result: dict[str, Any]) -> str:
    """One line on a result."""
    judged = judge(result)
    if judged is None or f"{OURS} fails" in result:
        return " | ".join(result[key] for key in (f"{OURS} fails", f"{OWN} fails") if key in result)
    values = ", ".join(
        f"{which} {_mean_se(result[which])[0]:.4g} ({result['seconds'][which]:.0f} s)" for which in (OURS, OWN)
    )
    return f"{values}, difference {judged[0]:.4g} ± {judged[1]:.2g}{', WORSE' if judged[2] else ''}; {result['blocks']}"


HEADER = f"""# Pyro's examples with our guide

`python tests/compatibility/run.py` takes the models of Pyro's own examples and tutorials, read from a checkout ({{}})
and not changed, puts `AutoAmortizedNormal(model)` with its defaults where their guide stands (but for `init_scale`,
where the example sets one, and an `MLP()` asked for by name for the discrete latents of SS-VAE, scANVI, AIR and the
Dirichlet process mixture), and trains both with the
same optimizer, learning rate and number of steps: those of the example or, where these take minutes, fewer steps or a
larger rate. `z_*` are the sites `z_0`, `z_1`, ... of a loop.
ELBOs are in nats on all data, larger is better: mean ± standard error over seeds
{", ".join(map(str, SEEDS))}, each from many draws after training; the model's own parameters are trained with the
guide. "Worse" means by more than 1 % of the example's own ELBO and more than two standard errors of the difference.
Where the example has a guide without an ELBO to compare with (MCMC, a point estimate), AutoNormal stands in. Downloads
are replaced by made-up data, as the column says.
"""


def page(results: dict[str, Any]) -> str:
    """Returns README.md."""
    known = [name for name in EXAMPLES if name in results]
    judged = {name: judge(results[name]) for name in known}
    ran = [name for name in known if judged[name] is not None]
    worse = [name for name in ran if judged[name][2]]  # type: ignore[index]
    failed = [name for name in known if f"{OURS} fails" in results[name]]
    sources = ", ".join(sorted({results[name]["checkout"] for name in known}))
    lines = [
        HEADER.format(sources),
        f"Of {len(known)} models, {len(known) - len(failed)} run; {len(worse)} of {len(ran)} end worse.\n",
    ]
    lines += ["| example | ours | own | ours - own | worse | steps | own guide | our guide | data |", "|" + "---|" * 9]
    lines += [_row(name, results[name], judged[name]) for name in ran]
    lines += ["\n## What does not run\n", "| example | with our guide | with its own |", "|---|---|---|"]
    for name in known:
        if name not in ran:
            ours, own = (results[name].get(f"{which} fails", "runs") for which in (OURS, OWN))
            lines.append(f"| {_link(name)} | {_cell(ours)} | {_cell(own)} |")
    told = [name for name in known if name in REMARKS and (name in failed or _differs(results[name]))]
    lines += ["\n## Why\n", *(f"* {name}: {REMARKS[name]}" for name in told)]
    return "\n".join(lines) + "\n"


def _row(name: str, result: dict[str, Any], judged: Any) -> str:
    difference, se, worse = judged
    cells = [_link(name), *(_number(*_mean_se(result[which])) for which in (OURS, OWN)), _number(difference, se)]
    cells += ["**worse**" if worse else "no", str(result["steps"]), EXAMPLES[name].own]
    summed = result.get("summed out")
    blocks = "; ".join([*result["blocks"], *([f"summed out: {', '.join(summed)}"] if summed else [])])
    return "| " + " | ".join([*cells, _cell(blocks), EXAMPLES[name].data]) + " |"


def _link(name: str) -> str:
    return f"{name} (`{EXAMPLES[name].source}`)"


def _number(value: float, se: float) -> str:
    digits = max(0, min(4, 1 - math.floor(math.log10(se)))) if se > 0 else 2
    return f"{value:.{digits}f} ± {se:.{digits}f}"


def _cell(text: str, length: int = 400) -> str:
    words = " ".join(text.partition("Trace Shapes")[0].replace("|", "\\|").split())
    return words if len(words) <= length else words[:length] + " ..."


if __name__ == "__main__":
    main()
