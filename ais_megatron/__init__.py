"""GRPO on Megatron-Core with FP8 rollouts, corrected by adaptive importance sampling.

How data flows through the package:

    tasks, prompts     problems -> prompts
    rollout            prompts -> rollouts, sampled by an engine in FP8
    tasks              rollouts -> rewards
    batch              rollouts, rewards -> one aligned batch
    policy             batch -> log-probabilities of the BF16 policy
    algorithm          log-probabilities -> diagnostics -> alpha -> loss scaler
    policy             batch, scaler -> gradients -> new weights, and ranges of K and V
    weight_sync        weights, scales -> quantised -> engine
    evaluation         held-out problems -> pass@k, between the steps
    trainer            runs these steps in this order

The other packages support this flow: config (the configuration), models (the model families), quantization (FP8 and FP4), cluster
(starting processes, checking machines), planning (memory and time before a run), runs (a run's folder, metrics and report), export
(checkpoints as Hugging Face folders) and comparison (several runs side by side).
"""
