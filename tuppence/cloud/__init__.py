"""A run on rented machines, through SkyPilot, which is left the clouds; what it lacks stands here.

launch     what is launched, decided and frozen: stages, machines, store     launch.py
machines   from the planner's options to machines that SkyPilot can rent     machines.py
clouds     what SkyPilot calls the cards, and cannot do on some clouds       clouds.py
scoring    what it costs to have a trained model judged, and where           scoring.py
tasks      a launch as SkyPilot's tasks, and as YAML                         tasks.py
kit        the code and its environment on the store, for the machines       kit.py
sky        SkyPilot in an environment of its own, asked by subprocess        sky.py
standing   what runs, what it has cost and will cost                         standing.py
cap        when it is ended from outside: money spent, a machine left        cap.py
ending     all of it cancelled and taken down, and asked again               ending.py
ssh        the same job on a machine that a person has already               ssh.py
"""
