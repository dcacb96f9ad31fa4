"""The strategies: their bodies, and a thin module of classes for each of Lightning's class trees."""
