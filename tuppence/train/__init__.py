"""Spends the plan: the loop, its clock, its optimizer, and the measuring of this machine."""
