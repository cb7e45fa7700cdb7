"""vLLM inside Ray actors: one engine that can change its policy between steps, for rollouts and for evaluation."""
