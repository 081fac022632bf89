#!lua flags=allow-oom
-- Gives back what reservations did not use, in every quota that they were counted in. Once each: the reservation goes.
-- KEYS  1 {t:<tenant>}:quota
-- ARGV  pairs of reservation id and tokens used; -1: nothing was begun, and the request itself is given back too
-- Reply: number of reservations settled.
local call = redis.call
local P = string.sub(KEYS[1], 1, -6)
local WINDOW_MS = 60000
local settled = 0

local function give_back(field, limit, amount)
  local drained = limit > 0 and call('HGET', KEYS[1], field)
  if drained then call('HSET', KEYS[1], field, string.format('%.3f', drained - amount * WINDOW_MS / limit)) end
end

for at = 1, #ARGV, 2 do
  local reservation = P .. 'r:' .. ARGV[at]
  local text = call('GET', reservation)
  if text then
    local words = {}
    for word in string.gmatch(text, '%S+') do words[#words + 1] = word end
    local used = tonumber(ARGV[at + 1])
    local unused = tonumber(words[1]) - math.max(0, used)
    for i = 1, 2 do
      local suffix = i == 1 and '' or ':' .. words[3]
      local first = i == 1 and 4 or 7
      give_back('t' .. suffix, tonumber(words[first + 1]), unused)
      if used < 0 then give_back('r' .. suffix, tonumber(words[first]), 1) end
      local day_key, field = P .. 'd:' .. words[2], 'tokens' .. suffix
      if tonumber(words[first + 2]) > 0 and call('HEXISTS', day_key, field) == 1 then
        call('HINCRBY', day_key, field, -unused)
      end
    end
    call('DEL', reservation)
    settled = settled + 1
  end
end
return settled
