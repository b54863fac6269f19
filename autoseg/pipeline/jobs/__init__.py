"""Work that is done by other processes: side by side on this machine, or as jobs of a cluster.

What is asked for is written down once (`batch`), cut into jobs that wait for each other (`schedule`), each of which is
looked after while it runs (`supervise`), here (`local`) or on a cluster (`submit`), does its work in a process of its
own (`tasks`), and is told about from its files (`status`).
"""
