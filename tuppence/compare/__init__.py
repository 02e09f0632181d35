"""Runs side by side, and why some are not.

alike   what may not be compared, and what would mend it
beside  each run's figures; losses at equal tokens, hours and dollars
tasks   scores, within their errors          text, page  what is shown
"""
