"""Learning from preferences: rollouts, PPO's objective, and the simulated labeller. Knows no stage or run folder."""
