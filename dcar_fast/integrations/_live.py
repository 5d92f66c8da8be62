"""A DCAR made of somebody else's tensors: the released generator's own parameters, under our names."""

from __future__ import annotations

import logging
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from dcar_fast._release import GENERATOR_NAMES, infer_generator_config, released_name
from dcar_fast.config import DCARConfig
from dcar_fast.engine.pack import Probe, forget
from dcar_fast.integrations._structure import Unrecognised, find_diffloss
from dcar_fast.integrations.diffloss import recognise
from dcar_fast.models.dcar import DCAR
from dcar_fast.reference.diffusion import diffusion_schedule

logger = logging.getLogger(__name__)

TOLERANCE = 2e-2  # of the largest value; the released generator may run in 16 bits
GUIDANCE = "c+s(c-u)"


class LiveGenerator:
    """The released generator as a DCAR that holds no weights of its own: :meth:`model` has those of this moment.

    ``Unrecognised`` (a ValueError) for a generator that is built otherwise, has hooks or layers with something around
    them, samples its residuals in another way, or whose forward gives other values than ours.
    """

    def __init__(self, generator: nn.Module) -> None:
        if not isinstance(generator, nn.Module):
            raise Unrecognised(f"generator is a {type(generator).__name__}, not the released DCAR module")
        self.generator = generator
        try:
            config = _config(generator)
        except (ValueError, AttributeError) as error:
            raise Unrecognised(f"{type(generator).__name__} is not the released generator: {error}") from error
        with torch.device("meta"):
            self._model = DCAR(config).eval()
        self._names = {name: released_name(name, GENERATOR_NAMES) for name in self._model.state_dict()}
        _same_names(set(self._names.values()), generator, type(generator).__name__)
        self._positions: tuple[Tensor, Tensor] | None = None  # theirs (1, N, D) and the view of it that is ours
        self._probe: Probe | None = None
        self._compare()

    def model(self) -> DCAR:
        """The DCAR with the generator's tensors as they are now."""
        for name, theirs in self._names.items():
            path, _, attribute = name.rpartition(".")
            tensor = self._find(theirs)
            module = self._model.get_submodule(path)
            expected = getattr(module, attribute)
            tensor = self._position(tensor) if name == "position" else tensor
            if tensor.shape != expected.shape:
                came = f"{tuple(tensor.shape)} instead of {tuple(expected.shape)}"
                raise Unrecognised(f"{theirs} of {type(self.generator).__name__} is {came}")
            own = module._buffers if attribute in module._buffers else module._parameters
            if own[attribute] is not tensor:
                own[attribute] = tensor
        tensors = [*self._model.parameters(), *self._model.buffers()]
        if self._probe is None or not self._probe.watches(tensors) or not self._probe.unchanged():
            forget(self._model)  # writes that no version counts are seen by some values
            self._probe = Probe(tensors, wait=True)
        return self._model

    def _find(self, name: str) -> Tensor:
        """The generator's tensor of this name, whose owner must be a plain layer of PyTorch or of the generator's."""
        path, _, attribute = name.rpartition(".")
        try:
            owner = self.generator.get_submodule(path)
            tensor = getattr(owner, attribute)
        except AttributeError as error:
            raise Unrecognised(f"{type(self.generator).__name__} has no {name} any more: {error}") from error
        layers = (nn.Linear, nn.LayerNorm, nn.Embedding)
        if isinstance(owner, layers) and type(owner) not in layers:
            raise Unrecognised(f"{path} is a {type(owner).__name__}: merge adapters first")
        if owner._forward_hooks or owner._forward_pre_hooks or is_parametrized(owner):
            raise Unrecognised(f"{path} has a forward hook or a parametrisation, which would not run")
        return tensor

    def _position(self, table: Tensor) -> Tensor:
        """(N, D), the same tensor as long as theirs is the same."""
        if self._positions is None or self._positions[0] is not table or _moved(*self._positions):
            self._positions = table, table.detach().reshape(table.shape[-2:])
        return self._positions[1]

    @torch.no_grad()
    def _compare(self) -> None:
        """Both forwards on the same input; logged where theirs cannot run here (it needs xformers, and so a GPU)."""
        model, config = self.model(), self._model.config
        device, dtype = model.token_embedding.weight.device, model.token_embedding.weight.dtype
        draw = torch.Generator().manual_seed(0)
        ids = torch.randint(config.codebook_size + 1, (2, config.num_tokens), generator=draw).to(device)
        states = torch.randn(2, config.text_length, config.text_dim, generator=draw).to(device, dtype)
        mask = (torch.arange(config.text_length) < 9).expand(2, -1).to(device)
        condition = torch.zeros(2, config.text_length, dtype=torch.int64, device=device)
        training = self.generator.training
        try:
            with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
                text = {"encoder_hidden_states": states, "encoder_attention_mask": mask}
                theirs = self.generator.eval()(ids, condition, **text, cond_drop_prob=0.0)
        except Exception as error:  # of somebody else's code
            reason = f"{type(error).__name__}: {error}"
            logger.warning("the generator's own forward does not run here and was not compared: %s", reason)
            return
        finally:
            self.generator.train(training)
        ours = model(ids, states, mask, torch.zeros(2, dtype=torch.bool, device=device))
        for name, a, b in (("logits", theirs[0], ours.logits), ("hidden states", theirs[1], ours.hidden)):
            off = (a.float() - b.float()).abs().max().item() if a.shape == b.shape else float("inf")
            if not off <= TOLERANCE * b.float().abs().max().item():
                raise Unrecognised(
                    f"{type(self.generator).__name__} computes other {name} than DC-AR: off by {off:.2g}"
                )


def _config(generator: nn.Module) -> DCARConfig:
    """What shapes tell, with the number of heads and the diffusion head's schedule and scale read off the modules."""
    config = infer_generator_config(generator.state_dict(), num_heads=generator.num_attention_heads)
    _, diffloss = find_diffloss(generator)
    known = recognise(diffloss)
    steps = known.schedule.num_steps
    usual = diffusion_schedule(steps)
    if known.schedule.timesteps != usual.timesteps or not _close(known.schedule.log_beta, usual.log_beta):
        raise Unrecognised(f"its diffusion is not the cosine schedule respaced to {steps} steps")
    if known.dialect.guidance != GUIDANCE or not known.dialect.clip:
        raise Unrecognised(f"its diffusion head samples as {known.dialect}")
    return replace(config, head_steps=steps, head_scale=known.dialect.scale)


def _close(a, b) -> bool:
    return bool(abs(a - b).max() < 1e-9)


def _same_names(ours: set[str], generator: nn.Module, kind: str) -> None:
    theirs = set(generator.state_dict())
    missing, extra = sorted(ours - theirs), sorted(theirs - ours)
    if missing or extra:
        lists = [f"{word} {', '.join(names[:6])}" for word, names in (("lacks", missing), ("also has", extra)) if names]
        raise Unrecognised(f"{kind} is not the released generator: it {' and '.join(lists)}")


def _moved(table: Tensor, view: Tensor) -> bool:
    return table.data_ptr() != view.data_ptr() or table.dtype != view.dtype or table.device != view.device
