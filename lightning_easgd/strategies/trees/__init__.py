"""A thin module of classes for each of Lightning's class trees."""
