"""Pure tensor maths: corruption, effects, key selection, solve, gates, lens targets, text metrics."""
