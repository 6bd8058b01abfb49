"""A recipe that begins from a model instead of from random weights.

Owns: how much gentler everything is then. The shape is the model's, its context is used only as far as a minute of this
machine reaches, and the learning rates are a thirtieth of those that raise a model from nothing.

Why a thirtieth: a trained model has something to lose. Its published makers end with rates near zero; AdamW at 1e-4
moves a weight by about 2e-5 a step, a thousandth of its usual size of 0.02 to 0.05, so that some hundred steps adapt it
and do not replace it. Muon's step is scaled to the same size: an orthogonal update of width w has entries of about
1 / sqrt(w), AdamW's of about 0.2 (arXiv 2502.16982, section 2.2), hence 0.2 * 1e-4 * sqrt(576) = 5e-4.

A large model has AdamW for all of its weights. Muon's iterations cost the same whatever the batch: a step of 2,048
tokens of 135M parameters took 8.7 seconds of forward and backward on two cores, and 4.3 more for Muon against 0.1 for
AdamW; and for a model that AdamW made, Muon was found to be no better (arXiv 2502.16982, section 3.5).
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from stateofgpt.model.convert import from_huggingface
from stateofgpt.model.folder import read_json_file
from stateofgpt.recipes.recipe import Recipe
from stateofgpt.rl.guards import GuardConfig
from stateofgpt.rl.ppo import PPOConfig
from stateofgpt.train.loop import LoopConfig

PRETRAIN, SFT, REWARD = (1e-4, 5e-4), (1e-4, 5e-4), (5e-5, 2e-4)  # AdamW's and Muon's rates
POLICY, VALUE = 3e-5, 6e-5
POLICY_OF_LARGE, VALUE_OF_LARGE = 1e-5, 2e-5  # at 3e-5 four iterations led 135M parameters 8 nats away, and astray
WARMUP = 20  # steps; the optimizer knows nothing of the model's gradients yet
SAVE_EVERY_S = 120.0  # a state of a hundred million parameters is gigabytes
LARGE = 20_000_000  # weights of hidden matrices from which a model has AdamW alone
LOOKS = (0.0, 0.5, 1.0)  # when it is measured and sampled from, which takes long too
ASKED, ASKED_OF_LARGE = 48, 24  # held-out prompts, which a larger model takes long to answer
VALIDATION_ROWS = 4
BATCH, BATCH_OF_LARGE = 32, 16  # answers of an iteration of reinforcement learning


def continued(recipe: Recipe, model: Path) -> Recipe:
    """`recipe`, beginning from the model in a folder, with its tokenizer and chat template."""
    parent = str(model.resolve())
    large = is_large(model)
    asked = ASKED_OF_LARGE if large else ASKED
    guards = recipe.rl.guards or GuardConfig()
    made = replace(
        recipe,
        tokenize=replace(recipe.tokenize, parent=parent),
        pretrain=replace(
            recipe.pretrain,
            parent=parent,
            width=None,
            layers=None,
            sizes=None,
            warmup=WARMUP,
            eval_tokens=min(recipe.pretrain.eval_tokens, 2048),
            eval_at=LOOKS if large else recipe.pretrain.eval_at,
            sample_at=LOOKS if large else recipe.pretrain.sample_at,
            loop=_at(recipe.pretrain.loop, *PRETRAIN, large),
        ),
        sft=replace(
            recipe.sft,
            validation_rows=min(recipe.sft.validation_rows, VALIDATION_ROWS) if large else recipe.sft.validation_rows,
            loop=_at(recipe.sft.loop, *SFT, large),
        ),
        reward=replace(
            recipe.reward,
            held_out_prompts=min(recipe.reward.held_out_prompts, asked),
            training=replace(
                recipe.reward.training,
                looks=1 if large else recipe.reward.training.looks,
                loop=_at(recipe.reward.training.loop, *REWARD, large),
            ),
        ),
        rl=replace(
            recipe.rl,
            batch=min(recipe.rl.batch, BATCH_OF_LARGE if large else BATCH),
            held_out_prompts=min(recipe.rl.held_out_prompts, asked),
            guards=replace(guards, prompts=min(guards.prompts, asked)),
            save_every_s=SAVE_EVERY_S,
            ppo=gentle(recipe.rl.ppo, large),
        ),
    )
    return replace(made, arena=replace(recipe.arena, prompts=min(recipe.arena.prompts, asked)))


def gentle(ppo: PPOConfig, large: bool) -> PPOConfig:
    """The same updates at the rates of a model that has something to lose."""
    policy, value = (POLICY_OF_LARGE, VALUE_OF_LARGE) if large else (POLICY, VALUE)
    return replace(ppo, policy=_at(ppo.policy, policy, policy), value=_at(ppo.value, value, value))


def _at(loop: LoopConfig, lr: float, muon_lr: float, large: bool = False) -> LoopConfig:
    optim = replace(loop.optim, lr=lr, muon_lr=muon_lr, use_muon=loop.optim.use_muon and not large)
    return replace(loop, save_every_s=SAVE_EVERY_S, optim=optim)


def is_large(model: Path) -> bool:
    """Whether the model in a folder has AdamW alone."""
    return _hidden_weights(model) >= LARGE


def _hidden_weights(model: Path) -> int:
    """How many weights Muon would train; 0 for a folder without a description, which the stages refuse in their way."""
    if not (model / "config.json").is_file():
        return 0
    c = from_huggingface(read_json_file(model / "config.json"), str(model / "config.json")).config
    return c.num_hidden_layers * c.hidden_size * (4 * c.hidden_size + 3 * c.intermediate_size)
