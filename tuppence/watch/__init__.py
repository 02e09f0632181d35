"""A run as it goes, and what became of it: read from the run folder again and again.

standing  state, money, pace, loss, what is being done      tempo  what it is going to come to
alive     whether a process is still at it                  tails  the new end of a file
screen    the picture in a terminal                         braille  its curve
"""
