"""stub for trial"""


def report(plan, studies, replicates):
    print(replicates)
    return []
