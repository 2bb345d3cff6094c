"""Recipes, engine settings and benchmarks; scripts here may use every package, nobody imports them."""
