"""Stage 2: masked GRPO, rollout actors feeding learner workers."""
