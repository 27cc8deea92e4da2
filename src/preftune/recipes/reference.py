"""The reference of a run: which model it is, and its log-probs of the run's rows."""

from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any

from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from preftune.batching.layout import Layout
from preftune.config.experiment import ExperimentConfig
from preftune.config.model import AttentionName, ModelConfig
from preftune.config.paths import cache_root
from preftune.data.table import TokenRows
from preftune.distributed.folders import SeenFolder
from preftune.distributed.runtime import Runtime
from preftune.errors import ModelError
from preftune.model.forward import PolicyModel
from preftune.model.layout_choice import LayoutChoice
from preftune.model.load import load_model_config, load_tokenizer, model_commit
from preftune.recipes.pairs import Pairs
from preftune.recipes.start_model import StartModel
from preftune.reference.build import ReferenceLogps, ShardSize, reference_logps
from preftune.reference.copies import copy_to_file_systems
from preftune.reference.fingerprints import namespace_key
from preftune.reference.store import ReferenceStore
from preftune.tracking.progress import ProgressDisplay, counting
from preftune.training.memory import explain_lack_of_memory


def pin_reference(
    config: ExperimentConfig, tokenizer: PreTrainedTokenizerBase, known: str | None
) -> ExperimentConfig:
    """Look at a reference of its own; no weights are read.

    Args:
        config: of the run.
        tokenizer: the policy's.
        known: the commit that the run began with.

    Returns:
        The config with the reference's commit as its revision.

    Raises:
        ModelError: it cannot be found, or its tokens are not the policy's.
    """
    reference = config.reference_model
    if reference is None:
        return config
    commit = known or model_commit(reference, "reference_")
    reference.model_revision = commit
    load_model_config(reference)
    check_same_tokens(
        reference, tokenizer, "reference_model_name_or_path", str(reference.model_name_or_path)
    )
    return replace(config, reference_model_revision=commit)


def check_same_tokens(
    model: ModelConfig, tokenizer: PreTrainedTokenizerBase, key: str, named: str
) -> None:
    """Refuse a model that would score other text than what another one's tokenizer made tokens of.

    Args:
        model: whose tokenizer is compared.
        tokenizer: the other one's.
        key: the option that named the model.
        named: what the user calls it.

    Raises:
        ModelError: it has other tokens, or none that can be read.
    """
    name = f"{key} is {named!r}"
    try:
        theirs = load_tokenizer(model).get_vocab()
    except ModelError as error:
        raise ModelError(
            f"{name}: its tokenizer, which must be the policy's, cannot be read ({error}); put the "
            "tokenizer's files beside it"
        ) from error
    ours = tokenizer.get_vocab()
    other = {token: number for token, number in ours.items() if theirs.get(token) != number}
    if other:
        token, number = min(other.items(), key=lambda item: item[1])
        there = f"{theirs[token]} there" if token in theirs else "absent there"
        raise ModelError(
            f"{name}: {len(other)} of the policy's {len(ours)} tokens are not the same in it "
            f"(first: {token!r} is {number}, {there}), so that it would score other text; give a "
            "model with the tokenizer of the policy"
        )


@dataclass
class Reference:
    """A model in eval mode whose log-probs are the reference's, and where they are kept."""

    model: PolicyModel | None
    """None once it is released."""
    is_own: bool
    """Whether it is another model than the policy."""
    layout: Layout
    fields: dict[str, Any]
    """What its log-probs depend on."""
    store: ReferenceStore
    cache: SeenFolder
    """Which ranks see the store's files."""
    runtime: Runtime
    display: ProgressDisplay

    def describe(self, config: ExperimentConfig) -> dict[str, Any]:
        """What the manifest says of it.

        Args:
            config: of the run, with commits as revisions.
        """
        about: dict[str, Any] = {"reference_namespace": self.store.namespace}
        if config.reference_model_name_or_path is not None:
            about["reference_model"] = {
                "name": config.reference_model_name_or_path,
                "commit": config.reference_model_revision,
                "weights": self.fields["weights"],
            }
        return about

    def logps(self, examples: TokenRows, stage: str) -> ReferenceLogps:
        """The log-probs of rows, from the store where it has them.

        Args:
            examples: the rows.
            stage: what the terminal calls it.
        """
        assert self.model is not None
        runtime, model = self.runtime, self.model.eval()
        most = max(ShardSize().tokens, int(examples.longest_side.max()))

        def forwards() -> AbstractContextManager[None]:
            return explain_lack_of_memory(
                "while the reference is scored",
                runtime.device,
                lambda: f"a forward of up to {most} tokens",
                lambda: ["a lower --max_length", "--dtype bfloat16"],
                then="; what is scored already is kept",
            )

        with self.display.stage(stage, examples.lengths[:, 1:].size, "answer") as update:
            # With the module inside the engine's wrapper, whose forward may wait for other ranks.
            values = reference_logps(
                model,
                examples,
                self.store,
                layout=self.layout,
                device=runtime.device,
                progress=counting(update),
                say=self.display.say,
                ranks=runtime,
                forwards=forwards,
            )
        if not self.cache.is_shared:
            copy_to_file_systems(self.store, runtime, is_leader=self.cache.leads(runtime.rank))
        self.display.say(
            f"{stage}: {values.num_computed} log-probs computed, {values.num_reused} reused from "
            f"{self.store.folder}"
        )
        return values

    def release(self) -> None:
        """Free the memory of a model of its own."""
        if self.is_own and self.model is not None:
            self.runtime.release(self.model)
        self.model = None


def open_reference(
    config: ExperimentConfig,
    policy: PolicyModel,
    policy_fields: dict[str, Any],
    layout: LayoutChoice,
    pairs: Pairs,
    cache: SeenFolder,
    runtime: Runtime,
    display: ProgressDisplay,
) -> Reference:
    """The policy as it is now, or the model that `reference_model_name_or_path` names.

    Args:
        config: of the run, with commits as revisions.
        policy: in its initial state.
        policy_fields: what its log-probs depend on.
        layout: how rows go through the policy; another reference takes the same, if it can.
        pairs: what will be scored.
        cache: which ranks see the same `cache_dir`.
        runtime: of the run.
        display: says what is loaded.

    Raises:
        ModelError: the reference cannot be loaded.
    """
    name, model, fields, form = config.model_name_or_path, policy, policy_fields, layout.name
    other = config.reference_model
    if other is not None:
        name = other.model_name_or_path
        display.say(f"loading {name}, the reference")
        own = StartModel.load(other, runtime, is_cut=config.shards_weights)
        model = own.loaded.policy
        choice = _layout_like(own, layout, pairs.longest_side)
        if choice.why:
            display.say(f"the reference's pairs are padded: {choice.why}")
        fields = own.identify(choice)
        runtime.spread_frozen(model, config)
        form = choice.name
    root = cache_root(config.cache_dir)
    store = runtime.together(
        lambda: ReferenceStore(root, namespace_key(fields), fields, model=str(name))
    )
    kind = Layout(form, model.limits, config.ld_alpha, config.scores_prompt)
    return Reference(model, other is not None, kind, fields, store, cache, runtime, display)


def _layout_like(model: StartModel, layout: LayoutChoice, longest: int) -> LayoutChoice:
    """The policy's layout and kernel, or the nearest to them that is right for another model."""
    wanted = "auto" if layout.name == "shared_prefix" else layout.name

    def choose(attention: AttentionName) -> LayoutChoice:
        return model.lay_out(wanted, attention, longest, with_backward=False)

    try:
        return choose(layout.attention)  # pyright: ignore[reportArgumentType]  # was one before
    except ModelError:
        return choose("sdpa")


def rows_to_score(config: ExperimentConfig, pairs: Pairs) -> dict[str | None, TokenRows]:
    """The rows of a run whose reference is read: None is training, others labels of held-out."""
    rows: dict[str | None, TokenRows] = {None: pairs.train.examples}
    if config.eval_strategy != "never":
        rows |= {label: dataset.examples for label, dataset in pairs.held_out.items()}
    return rows


def stage_name(label: str | None) -> str:
    """What terminal and manifest call the pass over one of them."""
    return "reference" if label is None else f"reference ({label or 'held out'})"
