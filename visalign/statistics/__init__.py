"""Numbers about scores, choices and pictures: agreement, Bradley-Terry strengths, what pictures look like.

From outside: all modules; pure functions of arrays.
"""
