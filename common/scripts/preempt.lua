#!lua flags=allow-oom
-- A worker gives jobs back to make room for a higher class: to the head of their queue, without counting an attempt or a
-- claim. A job that has been preempted often enough, or was handed out by its class's share, stays: it is not given back.
-- ARGV  1 worker  2 most preemptions of a job  then id  epoch
-- Reply: number of jobs given back. A repeat finds other epochs and changes nothing.
--@include base
--@include jobs
local now, given = now_ms(), 0
for at = 3, #ARGV, 2 do
  local j = load(ARGV[at])
  local is_held = j and j.st == 'R' and j.w == ARGV[1] and j.ep == tonumber(ARGV[at + 1])
  if is_held and j.fl == 0 and j.pe < tonumber(ARGV[2]) then -- mutant: preempted
    requeue(j, false, math.huge, math.huge, now)
    call('HSET', P .. 'j:' .. j.id, 'pe', int(j.pe + 1), 'nc', int(j.nc - 1))
    given = given + 1
  end
end
return given
