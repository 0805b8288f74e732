"""Faults injected into the real chain, and what became of each.

project.py      the chain on a data set and a model as small as they can be, and the states that faults begin from
artefacts.py    what a chain makes, free of dates and timings, so that two runs can be compared
damage.py       seeded damage of a file
kinds.py        every kind of file that the chain keeps, and the steps that use it
limits.py       the limits that the docs name: where damage is known to go unnoticed
server.py       steps run by forking a process that has imported everything already: a second, not fifteen
sandbox.py      a copy of a state in which a case runs, and which is as before after it
at_rest.py      one damaged file after the other, the steps that use it, and the outcome of each
live.py         the chain as a user starts it, and the undisturbed one
live_faults.py  kills, signals, full disks, copies at once, odd places of it
soak.py         the chain with random faults for an hour
page.py         docs/faults.md and docs/faults_zh.md, made from the tables above
"""
