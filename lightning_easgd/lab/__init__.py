"""The laboratory: commands, data, models, comparisons and simulations; nothing of the strategies imports it."""
