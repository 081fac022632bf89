"""Checks of chart, images and examples: what is rendered is judged by tools of others and by tests of what it means."""
