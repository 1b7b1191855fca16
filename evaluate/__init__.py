"""One question per file, each run as `python -m evaluate.NAME` (--help lists its flags).

recipe        pretrain, SFT, reward model, DPO, PPO on the embedded world, and a scoreboard
methods       every method from the same SFT model, with the same number of labels
scoreboard    run directories side by side: table, JSON and an HTML report (report.py, its sections;
              figures.py, what they show; charts.py, how to draw; report.css)
rewards       a reward model's accuracy, calibration and bias towards length
best_of_n     the best of n samples by reward model, process model, vote and judge
hacking       how PPO runs with known truth ended; detector.py, which ppo.py uses, warns
labels        how often labels agree with the judge, and what averaging does to them
chat          talk to a checkpoint in the terminal
watch         how fast a stage trains, how often the host waits for the GPU
speed         text for such measurements, and ways to run a model compared
"""
