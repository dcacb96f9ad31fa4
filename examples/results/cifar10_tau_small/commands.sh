#!/bin/sh
# The runs behind these tables; EASGD_DATA holds CIFAR-10. About an hour on two cores with nothing beside them.
set -e
compare() { easgd-compare experiment=cifar10_tau_small directory=outputs/cifar10_tau_small "$@"; }

# Learning rates, with seed 0; where the best was at an end of the grid, one more.
compare 'grid.seeds=[0]' \
    'grid.methods.eamsgd.lr=[0.04,0.02,0.01]' 'grid.methods.easgd.lr=[0.2,0.1,0.05]' \
    'grid.methods.downpour.lr=[0.05,0.025,0.0125]' 'grid.methods.post_local_sgd.lr=[0.04,0.02,0.01]' \
    'grid.methods.ddp.lr=[0.08,0.04,0.02]' 'grid.methods.msgd.lr=[0.04,0.02,0.01]' 'grid.methods.local.lr=[0.04,0.02,0.01]'
compare 'grid.seeds=[0]' 'grid.tau=[4]' 'grid.only=[eamsgd,easgd,downpour,post_local_sgd]' 'grid.methods.eamsgd.lr=[0.08]' \
    'grid.methods.easgd.lr=[0.4]' 'grid.methods.downpour.lr=[0.1]' 'grid.methods.post_local_sgd.lr=[0.08]'
compare 'grid.seeds=[0]' 'grid.tau=[64]' 'grid.only=[easgd,msgd,local]' 'grid.methods.easgd.lr=[0.4]' \
    'grid.methods.msgd.lr=[0.005]' 'grid.methods.local.lr=[0.005]'

# The best of each by validation error, with three seeds.
compare 'grid.seeds=[0,1,2]' 'grid.tau=[4]' 'grid.only=[eamsgd,easgd,downpour,post_local_sgd]' \
    'grid.methods.eamsgd.lr=[0.04]' 'grid.methods.easgd.lr=[0.4]' 'grid.methods.downpour.lr=[0.05]' \
    'grid.methods.post_local_sgd.lr=[0.04]'
compare 'grid.seeds=[0,1,2]' 'grid.tau=[64]' 'grid.only=[eamsgd,easgd,weak,downpour,post_local_sgd]' \
    'grid.methods.eamsgd.lr=[0.02]' 'grid.methods.easgd.lr=[0.2]' 'grid.methods.weak.lr=[0.02]' \
    'grid.methods.downpour.lr=[0.025]' 'grid.methods.post_local_sgd.lr=[0.02]'
compare 'grid.seeds=[0,1,2]' 'grid.only=[local,ddp,msgd]' 'grid.methods.local.lr=[0.01]' 'grid.methods.ddp.lr=[0.04]' \
    'grid.methods.msgd.lr=[0.01]'
