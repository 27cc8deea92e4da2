"""The end of a run: which weights `final/` gets, and how they are written."""

from torch import Tensor

from preftune.distributed.engine import Engine
from preftune.errors import CheckpointError
from preftune.model.load import in_dtype, saved_dtype, stop_at, written_weights
from preftune.recipes.model_folder import write_model_folder
from preftune.recipes.results import held_out_results
from preftune.recipes.run import Run
from preftune.training.restore import load_checkpoint
from preftune.training.step import TrainState


def tell_early_end(run: Run, state: TrainState) -> None:
    """Say why training ended before its last step, if it did."""
    stopping = run.early_stopping
    if stopping is None or not stopping.is_over or state.step == run.num_steps:
        return
    run.display.say(
        f"stopped early, after step {state.step} of {run.num_steps}: {stopping.describe()}"
    )
    run.manifest["early_stopping"] = {"step": state.step, "why": stopping.describe()}


def load_best(run: Run, state: TrainState) -> None:
    """Go back to the best checkpoint, if final/ is to have its weights."""
    best = run.checkpoints.best
    if best is None or not run.config.load_best_model_at_end:
        return
    if best.step is None:
        run.display.say(f"final/ has the last weights: {best.metric} never was a number")
    elif best.step != state.step:
        run.display.say(f"final/ gets the weights of step {best.step}, the best")
        checkpoint, policy = run.start.folder.checkpoint(best.step), run.loaded.policy.model
        load_checkpoint(checkpoint, state, policy, device=run.runtime.device, ranks=run.runtime)


def save_final(run: Run, engine: Engine) -> None:
    """Write `final/`, whole or not at all.

    Args:
        run: whose manifest and model are written.
        engine: whose weights are gathered one by one; rank 0 keeps them, in the dtype that is
            saved and in the host's memory.
    """
    dtype = saved_dtype(run.loaded, run.config.save_dtype)
    weights = {}
    engine.rest()
    written = written_weights(run.loaded)
    with run.display.stage("save final", None, "weight") as update:
        for number, (name, tensor) in enumerate(written.items(), 1):
            whole = engine.whole(tensor)
            if run.runtime.is_main:
                weights[name] = in_dtype(whole, dtype)
            update(number)
        run.runtime.decide(lambda: _write_final(run, weights))


def _write_final(run: Run, weights: dict[str, Tensor]) -> None:
    final = run.start.folder.final
    stop_id = run.stop_token_id()
    is_whole = run.loaded.adapter is None  # an adapter has no generation_config.json
    if is_whole and stop_id is not None and stop_at(run.loaded.policy.model, stop_id):
        token = run.tokenizer.convert_ids_to_tokens(stop_id)
        run.display.say(f"generation_config.json of final/ stops at {token!r}, too")
    try:
        run.manifest["save_dtype"] = write_model_folder(
            final,
            run.loaded,
            weights,
            run.tokenizer,
            run.config,
            run.manifest | {"results": held_out_results(run.start.folder.metrics)},
            revision=run.manifest["model"]["commit"],
        )
    except OSError as error:
        raise CheckpointError(
            f"{final} could not be written ({error}); free some space, and run the same "
            "command to write it from the last checkpoint"
        ) from error
    run.display.say(f"saved {final}")
