"""A model before anything is done to it, the same on all ranks: loaded, laid out, identified.

Where an engine cuts the weights, no device can hold them whole. Then they are in the memory of rank
0's host until the engine fetches them, and rank 0 finds out for all what there is to know.
"""

from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

from preftune.config.dpo import ForwardLayout
from preftune.config.model import AttentionName, ModelConfig
from preftune.distributed.delivery import starting_place
from preftune.distributed.runtime import AUTOCAST, Runtime
from preftune.model.adapters import StartAdapter, add_adapter
from preftune.model.layout_choice import LayoutChoice, choose_layout, use_layout
from preftune.model.load import LoadedModel, load_model
from preftune.model.shallow import shallow
from preftune.recipes.same_start import agree_on_model
from preftune.reference.fingerprints import namespace_fields


@dataclass(frozen=True)
class StartModel:
    """A model as its files have it."""

    config: ModelConfig
    loaded: LoadedModel
    runtime: Runtime
    is_cut: bool
    """Whether an engine will cut its weights; see `starting_place`."""

    @classmethod
    def load(
        cls,
        config: ModelConfig,
        runtime: Runtime,
        *,
        is_cut: bool,
        adapter: StartAdapter | None = None,
    ) -> "StartModel":
        """Load it on every rank, with the adapter that it starts from.

        Raises:
            ModelError: it cannot be loaded; on every rank.
        """
        place = starting_place(runtime.device, runtime, is_cut=is_cut)

        def load() -> LoadedModel:
            loaded = load_model(config, place, AUTOCAST[runtime.precision])
            if adapter is not None:
                loaded.adapter = add_adapter(loaded.policy.model, adapter)
            return loaded

        loaded = runtime.together(load)
        loaded.policy.compact_head = runtime.send(loaded.policy.compact_head)
        return cls(config, loaded, runtime, is_cut)

    def lay_out(
        self,
        wanted: ForwardLayout,
        attention: AttentionName,
        longest: int,
        *,
        with_backward: bool = True,
    ) -> LayoutChoice:
        """Choose how rows go through it, on rank 0 for all; see `choose_layout`.

        Raises:
            ModelError: what is wanted by name cannot be had; on every rank.
        """
        policy, runtime = self.loaded.policy, self.runtime

        def choose() -> LayoutChoice:
            with shallow(policy, runtime.device) if self.is_cut else nullcontext():
                return choose_layout(
                    policy,
                    wanted,
                    attention,
                    longest,
                    autocast=AUTOCAST[runtime.precision],
                    with_backward=with_backward,
                )

        layout = runtime.decide(choose)
        use_layout(policy, layout)
        return layout

    def identify(self, layout: LayoutChoice) -> dict[str, Any]:
        """What its log-probs depend on, seen to be the same on all ranks.

        Raises:
            ConfigError: it is not; on every rank.
        """
        runtime = self.runtime

        def fields() -> dict[str, Any]:
            return namespace_fields(
                self.loaded.policy,
                precision=runtime.precision,
                layout=layout.name,
                device=runtime.device.type,
            )

        if self.is_cut:
            return runtime.decide(fields)
        own = fields()
        agree_on_model(str(self.config.model_name_or_path), own, runtime)
        return own
