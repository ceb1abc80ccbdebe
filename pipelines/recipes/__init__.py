"""Recipes: from files as their authors release them, or from nothing, to converted data."""
