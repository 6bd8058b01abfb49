"""A recipe that begins from a model instead of from random weights.

Owns: how much gentler everything is then. The shape is the model's, its context is used only as far as a minute of this
machine reaches, and the learning rates are a thirtieth of those that raise a model from nothing.

Why a thirtieth: a trained model has something to lose. Its published makers end with rates near zero; AdamW at 1e-4
moves a weight by about 2e-5 a step, a thousandth of its usual size of 0.02 to 0.05, so that some hundred steps adapt it
and do not replace it. Muon's step is scaled to the same size: an orthogonal update of width w has entries of about
1 / sqrt(w), AdamW's of about 0.2 (arXiv 2502.16982, section 2.2), hence 0.2 * 1e-4 * sqrt(576) = 5e-4.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from stateofgpt.recipes.recipe import Recipe
from stateofgpt.rl.ppo import PPOConfig
from stateofgpt.train.loop import LoopConfig

PRETRAIN, SFT, REWARD = (1e-4, 5e-4), (1e-4, 5e-4), (5e-5, 2e-4)  # AdamW's and Muon's rates
POLICY, VALUE = 3e-5, 6e-5
WARMUP = 20  # steps; the optimizer knows nothing of the model's gradients yet
SAVE_EVERY_S = 120.0  # a state of a hundred million parameters is gigabytes
ASKED = 48  # held-out prompts, which a larger model takes long to answer


def continued(recipe: Recipe, model: Path) -> Recipe:
    """`recipe`, beginning from the model in a folder, with its tokenizer and chat template."""
    parent = str(model.resolve())
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
            loop=_at(recipe.pretrain.loop, *PRETRAIN),
        ),
        sft=replace(recipe.sft, loop=_at(recipe.sft.loop, *SFT)),
        reward=replace(
            recipe.reward,
            held_out_prompts=min(recipe.reward.held_out_prompts, ASKED),
            training=replace(recipe.reward.training, loop=_at(recipe.reward.training.loop, *REWARD)),
        ),
        rl=replace(
            recipe.rl,
            batch=min(recipe.rl.batch, 32),
            held_out_prompts=min(recipe.rl.held_out_prompts, ASKED),
            save_every_s=SAVE_EVERY_S,
            ppo=_gentle(recipe.rl.ppo),
        ),
    )
    return replace(made, arena=replace(recipe.arena, prompts=min(recipe.arena.prompts, ASKED)))


def _gentle(ppo: PPOConfig) -> PPOConfig:
    return replace(ppo, policy=_at(ppo.policy, POLICY, POLICY), value=_at(ppo.value, VALUE, VALUE))


def _at(loop: LoopConfig, lr: float, muon_lr: float) -> LoopConfig:
    return replace(loop, save_every_s=SAVE_EVERY_S, optim=replace(loop.optim, lr=lr, muon_lr=muon_lr))
