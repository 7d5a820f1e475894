"""The fault run: the whole stack as processes of one machine, requests all the time, a fault a second, and an independent checker.

faults      what can be done to it, and the draw from a seed
moments     when a process is hit: as each phase begins
strikes     how each of them is done
misuse      connections that nobody should make: a KEDA that has gone wrong, clients that leave
wires       the connections, and how each is cut, slow, silent, refused or half-open
proxy       a connection that can be cut, slow or silent
disk        a machine's disk, which can be slow
stack       the processes, started again as a service manager does
engine      the model server
clients     who asks; a process of its own, as are the next three
captures    who takes snapshots, pushes and removes them
keda        who asks how many requests there are
borrowers   who borrows memory of gpumem
seen        what is on the machine when it is quiet
checker     reads the journals of all of these, and says what was wrong; it shares no code with the product
report      the table
planted/    what a machine's programs read first: they tell of phases, and may have a bug that the checker has to find
"""
