"""From logits to tokens: parameters, state on the device, the sampler."""
