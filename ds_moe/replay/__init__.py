"""Routing replay: the experts that an inference engine used, given to the layers that train on its rollouts."""
