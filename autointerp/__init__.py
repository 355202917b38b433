"""From latents to exemplars, explanations, simulations and scores."""
