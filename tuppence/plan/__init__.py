"""From what was asked to what it takes: parameters, FLOPs, memory, time, dollars, loss. No torch."""
